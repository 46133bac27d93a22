#!/bin/bash
# One run on all hosts of a Cloud TPU pod slice. Not run on a TPU.
#
#   TPU=my-v5e-16 ZONE=us-west4-a scripts/tpu_pod.sh --config=configs/qkd.py --workdir=runs/qkd
#
# Every host has this checkout at the same revision in ~/qkd_jax, an environment with jax[tpu] in
# ~/qkd_jax/.venv, and the data; the run refuses hosts that differ. Host 0 keeps the run folder: a
# spot slice that is deleted takes it along, unless --workdir is on a disk that stays (Filestore).
set -euo pipefail
: "${TPU:?the name of the slice}" "${ZONE:?its zone}"

# JAX finds the other hosts by itself. The arguments are quoted for the remote shells.
command="cd ~/qkd_jax && .venv/bin/python launch.py $(printf '%q ' "$@")"

# 75: saved, or a host died (137 and 143 are the codes of one that was killed); the same command
# resumes. An ssh that breaks (255) is tried again too: where the run lives on there, the new one is
# refused, by its folder's lock or by chips that are in use.
for attempt in $(seq 20); do
    code=0
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command" || code=$?
    case "$code" in
        75 | 137 | 143 | 255) echo "attempt $attempt ended with $code; again in 30 s" >&2 && sleep 30 ;;
        *) exit "$code" ;;
    esac
done
exit "$code"
