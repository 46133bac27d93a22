#!/usr/bin/env bash
# XLA:CPU does not round what is computed in bfloat16 to bfloat16 where float32 reads it.
#
# Versions: jax 0.10.1, jaxlib 0.10.1, numpy 2.4.6, CPU.
#
# Guess: jnp.dot of two bfloat16 arrays is a bfloat16 array, so what `.astype(float32)` makes of it are
#   numbers of bfloat16, compiled or not.
# Truth: compiled, the float32 numbers go straight to their reader, and the rounding is skipped
#   (xla_allow_excess_precision): hardly one is a number of bfloat16. One operation at a time, or with
#   jax.lax.optimization_barrier or reduce_precision between, all are. A cast that the program writes
#   itself is kept, and so is float16. A quantizer behind such a product finds other codes with jit
#   than without.
#
# Output seen:
#   numbers of the half type behind a product, one operation at a time / compiled / with a barrier
#   bfloat16 dot: 100 % / 0 % / 100 %
#   bfloat16 conv: 100 % / 0 % / 100 %
#   bfloat16 multiply: 100 % / 3 % / 100 %
#   bfloat16 cast: 100 % / 100 % / 100 %
#   float16 dot: 100 % / 100 % / 100 %
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 jax==0.10.1 jaxlib==0.10.1
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/output"
import jax
import jax.numpy as jnp

print("numbers of the half type behind a product, one operation at a time / compiled / with a barrier")
conv = lambda a, b: jax.lax.conv(a.reshape(4, 16, 8, 8), b.reshape(16, 16, 4, 4), (1, 1), "SAME")
cases = (
    ("bfloat16", "dot", jnp.dot),
    ("bfloat16", "conv", conv),
    ("bfloat16", "multiply", jnp.multiply),
    ("bfloat16", "cast", lambda a, b: (a.astype("float32") * b).astype("bfloat16")),
    ("float16", "dot", jnp.dot),
)
for dtype, name, product in cases:
    a, b = jax.random.normal(jax.random.key(0), (2, 64, 64)).astype(dtype)

    def wide(a, b, hold=lambda x: x):
        return hold(product(a, b)).astype(jnp.float32)

    def held(a, b):
        return wide(a, b, jax.lax.optimization_barrier)

    found = wide(a, b), jax.jit(wide)(a, b), jax.jit(held)(a, b)
    shares = (float((y == y.astype(dtype).astype(jnp.float32)).mean()) for y in found)
    print(f"{dtype} {name}: " + " / ".join(f"{share:.0%}".replace("%", " %") for share in shares))
PYTHON
sed -n '/^# Output seen:/,/^set/p' "$0" | sed -n 's/^#   //p' | diff - "$folder/output"
