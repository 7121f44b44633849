#!/bin/sh
# The main job on the shipped model and bytes, offline; every number printed is of this run.
set -eu
out=demo-output
rm -rf "$out"
mkdir "$out"
export HF_HUB_OFFLINE=1

echo "1/4  calibrate: what the layers of the demo model see, over some of the shipped bytes"
marlin calibrate megabyte-demo -o "$out/stats.safetensors" --max-bytes 48k --seq-bytes 4096

echo
echo "2/4  quantize: 4 bits for the global part, which holds nearly all weights, 8 for the local one, which every byte passes"
marlin quantize megabyte-demo -o "$out/megabyte-demo-4-8" --global-bits 4 --local-bits 8 --stats "$out/stats.safetensors"

echo
echo "3/4  generate: bytes in a pipe, from the packed model (10 million weights: words and syntax, seldom sense)"
continued() {
    printf '%s' "$1"
    printf '%s' "$1" | marlin generate "$out/megabyte-demo-4-8" --max-bytes 160 --temperature "$2" --seed 1
    echo
    echo
}
continued 'If you want to change the language of the menus, ' 0.7
continued 'def read_lines(path):
    """' 0
continued 'Um die Datei zu öffnen, ' 0.4

echo "4/4  bench: what each format costs: bits per byte more, with their standard error; KL divergence; bytes/s of one stream"
marlin bench megabyte-demo --formats nvfp4,mxfp4,mxfp8,int4,int8,4/8 --max-quality-bytes 12k \
    --prompt-bytes 256 --decode-bytes 64 --repeats 3

echo
echo "Now yours:"
echo "  marlin info PATH                                      # what a checkpoint is, and what it takes"
echo "  marlin bench PATH --formats nvfp4,mxfp8,4/8           # what its bits cost"
echo "  echo 'prilis zlutoucky kun' | marlin generate byt5-demo"
