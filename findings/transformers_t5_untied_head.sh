#!/usr/bin/env bash
# T5ForConditionalGeneration of transformers 5 ties its head although the configuration says tie_word_embeddings=False.
#
# A model built from such a configuration has one array for the head and the embeddings, does not scale what the head reads
# (as a T5 with a head of its own), and save_pretrained writes tie_word_embeddings true, without an lm_head.weight. Read by
# transformers 4 or by another tool, true means tied and scaled by d_model ** -0.5: other logits.
# Seen with transformers 5.24.0: tied, and the saved config.json has tie_word_embeddings true, scale_decoder_outputs false.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json

import transformers
from safetensors import safe_open
from transformers import T5Config, T5ForConditionalGeneration

transformers.logging.set_verbosity_error()
shape = dict(vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0)
model = T5ForConditionalGeneration(T5Config(**shape, tie_word_embeddings=False))
tied = model.lm_head.weight is model.shared.weight
model.save_pretrained("saved")
document = json.load(open("saved/config.json"))
with safe_open("saved/model.safetensors", "pt") as file:
    stored = "lm_head.weight" in file.keys()
said = {name: document.get(name) for name in ("tie_word_embeddings", "scale_decoder_outputs")}
print("asked for untied; tied:", tied, "| lm_head.weight stored:", stored, "| config.json:", said)
assert tied and not stored and said == {"tie_word_embeddings": True, "scale_decoder_outputs": False}, "it behaves otherwise now"
PYTHON
