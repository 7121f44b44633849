#!/usr/bin/env bash
# generate() of transformers 5 runs past the end of an answer where a T5's config.json leaves eos_token_id out.
#
# The configuration's own default is 1 in both versions. Up to transformers 4 the generation settings that are made for a
# folder without generation_config.json take it, and generate stops at id 1. In 5 they are left without an end: the same
# folder gives the answer, the end, and then what the model says after it, to max_new_tokens.
# Seen: with 4.57.6 the answer ends with its first 1; with 5.24.0 it has 300 ids after the start and 1 among them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/answer.py" <<'PYTHON'
import json
import os
import sys

import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration

transformers.logging.set_verbosity_error()
folder = sys.argv[1]
if not os.path.exists(folder):
    torch.manual_seed(0)
    shape = dict(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(folder)
    os.remove(f"{folder}/generation_config.json")
    path = f"{folder}/config.json"
    document = json.load(open(path))
    document.pop("eos_token_id", None)
    json.dump(document, open(path, "w"))
model = T5ForConditionalGeneration.from_pretrained(folder)
torch.manual_seed(1)
answer = model.generate(torch.tensor([[8, 9, 1]]), do_sample=True, top_k=0, temperature=50.0, max_new_tokens=300)[0].tolist()
ends = (model.config.eos_token_id, model.generation_config.eos_token_id)
print(transformers.__version__, "| ends by config, by generation settings:", ends, "| ids:", len(answer) - 1, "| first 1:", answer.index(1))
stopped = answer.index(1) == len(answer) - 1
expected = ((1, 1), True) if transformers.__version__.startswith("4.") else ((1, None), False)
assert (ends, stopped) == expected, "it behaves otherwise now"
PYTHON
for version in 4.57.6 5.24.0; do
  ${PYTHON:-python3} -m venv "$folder/venv-$version"
  "$folder/venv-$version/bin/pip" install --quiet "torch==2.13.0" "transformers==$version"
  "$folder/venv-$version/bin/python" "$folder/answer.py" "$folder/model"
done
