#!/bin/sh
# The main job on the shipped model and bytes, offline; every number printed is of this run.
set -eu
out=demo-output
rm -rf "$out"
mkdir "$out"
export HF_HUB_OFFLINE=1

echo "1/4  calibrate: activation statistics of the demo model over the shipped corpus"
marlin calibrate megabyte-demo -o "$out/stats.safetensors" --max-bytes 48k --seq-bytes 4096
marlin calibrate --show "$out/stats.safetensors" | head -n 12

echo "2/4  quantize: 4 bits for the global part, 8 for the local one, errors weighted by the statistics"
marlin quantize megabyte-demo -o "$out/megabyte-demo-4-8" --global-bits 4 --local-bits 8 --stats "$out/stats.safetensors"

echo "3/4  generate: bytes in a pipe, from the packed model"
printf 'To install the package, ' | marlin generate "$out/megabyte-demo-4-8" --max-bytes 120 --temperature 0.5 --seed 1
echo
echo "     and raw bytes, seen by od:"
head -c 256 "$out/stats.safetensors" | marlin generate "$out/megabyte-demo-4-8" --raw --max-bytes 32 | od -A d -t x1

echo "4/4  bench: speed, and quality against the 16-bit model on bytes of the shipped corpus"
marlin bench megabyte-demo "$out/megabyte-demo-4-8" --prompt-bytes 256 --decode-bytes 64 --repeats 3 \
    --quality default --max-quality-bytes 12k --reference megabyte-demo
