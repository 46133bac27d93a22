#!/usr/bin/env bash
# XLA's ReducePrecision to float16's 5 and 10 bits takes float16's small numbers to zero.
#
# Versions: jax 0.10.1, jaxlib 0.10.1, numpy 2.4.6, CPU.
#
# Guess: jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10) is the documented way of
#   rounding to float16 that a compiler may not leave out, so it gives x.astype(float16).
# Truth: it knows no subnormal numbers: of the 63,488 finite numbers of float16 the 2,046 below 2^-14
#   become 0, each of which a cast keeps. For bfloat16 (8 and 7 bits), whose subnormal numbers are
#   float32's own, all numbers above 2^-126 come back.
#
# Output seen:
#   float16: 2046 of 63488 finite numbers change, the largest is 6.1e-05; a cast changes 0
#   bfloat16: 0 of 65026 finite normal numbers change; a cast changes 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 jax==0.10.1 jaxlib==0.10.1
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/output"
import jax
import jax.numpy as jnp
import numpy as np

for dtype, exponent, mantissa in ((jnp.float16, 5, 10), (jnp.bfloat16, 8, 7)):
    half = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        x = half.astype(np.float32)
    kind = "finite"
    x = x[np.isfinite(x)]
    if dtype == jnp.bfloat16:
        kind = "finite normal"
        x = x[(x == 0) | (np.abs(x) >= 2.0**-126)]
    reduced = np.asarray(jax.lax.reduce_precision(x, exponent, mantissa))
    cast = np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32))
    changed = np.abs(x[reduced != x])
    largest = f", the largest is {changed.max():.1e}" if changed.size else ""
    print(
        f"{jnp.dtype(dtype).name}: {changed.size} of {x.size} {kind} numbers change{largest}; "
        f"a cast changes {int((cast != x).sum())}"
    )
PYTHON
sed -n '/^# Output seen:/,/^set/p' "$0" | sed -n 's/^#   //p' | diff - "$folder/output"
