#!/usr/bin/env bash
# NumPy's mean and variance of a bfloat16 array from ml_dtypes: a constant has variance 0.26.
#
# Versions: numpy 2.5.5 and ml_dtypes 0.6.0 on Python 3.12 or newer, numpy 2.4.6 on 3.11.
# One would guess: what NumPy does for float16, which is as small. `mean` and `var` of float16 are
# taken in float32 and rounded at the end, and `sum` adds pairwise: a thousand ones have sum 1000,
# mean 1 and variance 0.
# True: NumPy knows float16 by name; a dtype from outside gets the plain loop. It adds one element
# after the other in bfloat16, where 256 + 1 is 256: sum 256, mean 0.2559, variance 0.2559, without
# a warning. float8 stops at 16. `dot` and `@` of the same array are right, and so is everything
# with dtype=float32. `sort` has no place for NaN and leaves what stands behind it unsorted, where
# float16 puts NaN last; `isnan` is right.
# Output seen:
#     float16        sum 1000.0 mean 1.0 var 0.0 dot 1000.0
#     bfloat16       sum 256.0 mean 0.255859375 var 0.255859375 dot 1000.0
#     float8_e4m3fn  sum 16.0 mean 0.015625 var 0.015625 dot nan (1000 is above its 448)
#     bfloat16       with dtype=float32: sum 1000.0 mean 1.0
#     sort of 2, nan, 1, 0: float16 [0.0, 1.0, 2.0, nan] bfloat16 [2.0, nan, 0.0, 1.0]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
numpy=$("$folder/venv/bin/python" -c \
    'import sys; print("2.5.5" if sys.version_info >= (3, 12) else "2.4.6")')
"$folder/venv/bin/python" -m pip -qq --disable-pip-version-check install \
    "numpy==$numpy" ml_dtypes==0.6.0
"$folder/venv/bin/python" - << 'PY'
import ml_dtypes
import numpy as np

seen = {}
for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
    ones = np.ones(1000, dtype)
    row = [float(f) for f in (ones.sum(), ones.mean(), ones.var(), np.dot(ones, ones))]
    seen[np.dtype(dtype).name] = row
    print(f"{np.dtype(dtype).name:14} sum {row[0]} mean {row[1]} var {row[2]} dot {row[3]}")
wide = np.ones(1000, ml_dtypes.bfloat16)
wide = [float(wide.sum(dtype=np.float32)), float(wide.mean(dtype=np.float32))]
print(f"{'bfloat16':14} with dtype=float32: sum {wide[0]} mean {wide[1]}")
values = [2.0, np.nan, 1.0, 0.0]
half, brain = (
    np.sort(np.array(values, t)).astype(float).tolist() for t in (np.float16, ml_dtypes.bfloat16)
)
print(f"sort of 2, nan, 1, 0: float16 {half} bfloat16 {brain}")

assert seen["float16"] == [1000, 1, 0, 1000]
assert seen["bfloat16"] == [256, 0.255859375, 0.255859375, 1000]
assert seen["float8_e4m3fn"][:3] == [16, 0.015625, 0.015625]
assert wide == [1000, 1]
assert half[:3] == [0, 1, 2] and brain[:3] != [0, 1, 2]
PY
