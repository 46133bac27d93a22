#!/usr/bin/env bash
# When process 0 of jax.distributed dies, JAX ends the others by SIGABRT; a callback makes it worse.
#
# Versions: jax 0.10.1, jaxlib 0.10.1, CPU (two processes on one machine); 0.12.0.1 does the same.
#
# Guess: after jax.distributed.initialize the death of a process is an error in the others, raised by
#   the next collective or given to the client's missed_heartbeat_callback, so that a program can
#   say who died, and leave with an exit code of its own.
# Truth: the client asks its service for errors in a C++ thread. When the service's process dies, that
#   call fails at once and the process is aborted (signal 6), within milliseconds, before Python sees
#   anything; heartbeat_timeout_seconds and jax_enable_recoverability change nothing about it. With a
#   Python function as missed_heartbeat_callback, C++ cannot hand it the status: std::bad_cast, and
#   the same signal. A client that reaches the service through a forwarder of its own process, which
#   keeps the connection open when the other end has gone, lives on.
#
# Output seen:
#   plain: the other process was ended by signal 6
#   recoverability: the other process was ended by signal 6
#   callback: the other process was ended by signal 6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 jax==0.10.1 jaxlib==0.10.1
cat > "$folder/one.py" <<'PYTHON'
import sys
import time

import jax
from jax._src import distributed

process, port, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if how == "recoverability":
    jax.config.update("jax_enable_recoverability", True)
if how == "callback":
    client = distributed._jax.get_distributed_runtime_client
    distributed._jax.get_distributed_runtime_client = lambda *args, **options: client(
        *args, **options, missed_heartbeat_callback=lambda *status: print("called", status)
    )
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, heartbeat_timeout_seconds=100)
jax.devices()
print("up", flush=True)
time.sleep(30)
PYTHON
cat > "$folder/two.py" <<'PYTHON'
import socket
import subprocess
import sys

for how in ("plain", "recoverability", "callback"):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    first, second = (
        subprocess.Popen(
            [sys.executable, sys.argv[1], str(process), str(port), how],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for process in (0, 1)
    )
    assert second.stdout.readline() == first.stdout.readline() == "up\n"
    first.kill()
    second.wait(timeout=20)
    first.wait()
    print(f"{how}: the other process was ended by signal {-second.returncode}", flush=True)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/two.py" "$folder/one.py" | tee "$folder/output"
sed -n '/^# Output seen:/,/^set/p' "$0" | sed -n 's/^#   //p' | diff - "$folder/output"
