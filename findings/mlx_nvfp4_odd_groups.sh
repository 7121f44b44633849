#!/usr/bin/env bash
# MLX on a CPU neither packs nor unpacks an nvfp4 matrix that has an odd number of groups.
#
# One row of 16 values, 3 of 16 or 5 of 48 end in "Cannot reshape array", as groups are taken two by two; so do the first rows
# of a packed matrix that has more. An even number of groups, and mxfp4 and mxfp8 with any number, work.
# Seen with mlx 0.32.4: [reshape] Cannot reshape array of size 16 into shape (0,4,8).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import mlx.core as mx

mx.set_default_device(mx.cpu)
NVFP4, MXFP4, MXFP8 = ({"mode": mode, "group_size": size, "bits": bits} for mode, size, bits in (("nvfp4", 16, 4), ("mxfp4", 32, 4), ("mxfp8", 32, 8)))


def outcome(work):
    try:
        mx.eval(work())
    except ValueError as error:
        return str(error)
    return "works"


def packing(rows, columns, **kind):
    return outcome(lambda: mx.quantize(mx.random.normal((rows, columns)), **kind))


words, scales = mx.quantize(mx.random.normal((4, 16)), **NVFP4)
odd = [packing(rows, columns, **NVFP4) for rows, columns in ((1, 16), (3, 16), (5, 48))]
odd.append(outcome(lambda: mx.dequantize(words[:3], scales[:3], **NVFP4)))
even = [packing(rows, columns, **NVFP4) for rows, columns in ((2, 16), (1, 32), (4, 48))]
even += [outcome(lambda: mx.dequantize(words[:2], scales[:2], **NVFP4)), packing(1, 32, **MXFP4), packing(3, 32, **MXFP8)]
print("odd numbers of groups:", *odd, sep="\n  ")
print("even ones, mxfp4, mxfp8:", *even)
assert all("reshape" in each for each in odd) and set(even) == {"works"}, "MLX behaves otherwise now"
PYTHON
