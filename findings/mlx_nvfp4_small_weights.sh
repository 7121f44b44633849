#!/usr/bin/env bash
# mx.quantize(mode="nvfp4") makes zeros of small weights: with a standard deviation of 0.001 every weight is gone.
#
# The scale of a group is stored as E4M3, whose smallest value is 2^-9; a scale below half of that becomes 0, and with it the
# whole group. The format's own remedy is a scale of the whole tensor, which mx.quantize leaves out unless it is asked.
# Seen with mlx 0.32.4 on its CPU backend: relative squared error 0.011 at 0.02, 0.91 at 0.002, 1 at 0.001.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import mlx.core as mx

mx.random.seed(0)
lost = {}
for deviation in (0.02, 0.002, 0.001):
    weight = mx.random.normal((64, 256)) * deviation
    packed = mx.quantize(weight, group_size=16, bits=4, mode="nvfp4")
    back = mx.dequantize(*packed, group_size=16, bits=4, mode="nvfp4")
    lost[deviation] = (mx.square(back - weight).sum() / mx.square(weight).sum()).item()
print("relative squared error by standard deviation:", lost)
assert lost[0.02] < 0.02 and 0.8 < lost[0.002] < 1 and lost[0.001] == 1, "mlx behaves otherwise now"
PYTHON
