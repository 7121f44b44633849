#!/usr/bin/env bash
# A T5 whose decoder has more layers than its encoder cannot generate in transformers 5: the cache has too few layers.
#
# The cache of the decoder is made by num_layers, which is the encoder's; num_decoder_layers, the decoder's own number and
# a documented field, is not asked. Training and a forward pass without a cache work.
# Seen with transformers 5.24.0: 1 encoder and 2 decoder layers, IndexError: list index out of range; 2 and 1 generates.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
shape = dict(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_heads=4, decoder_start_token_id=0)
ids = torch.tensor([[100, 101, 102, 1]])


def outcome(**layers):
    model = T5ForConditionalGeneration(T5Config(**shape, **layers)).eval()
    try:
        model.generate(ids, max_new_tokens=3, do_sample=False)
        return "generates"
    except IndexError as error:
        return f"IndexError: {error}"


SHAPES = [(2, 2), (2, 1), (1, 2)]  # layers of the encoder, of the decoder
found = {shape: outcome(num_layers=shape[0], num_decoder_layers=shape[1]) for shape in SHAPES}
for layers, what in found.items():
    print(layers, what)
assert list(found.values()) == ["generates", "generates", "IndexError: list index out of range"], "it behaves otherwise now"
PYTHON
