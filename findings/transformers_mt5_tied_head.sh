#!/usr/bin/env bash
# An mT5 whose head is tied gives other logits in transformers 5 than in transformers 4: the factor d_model ** -0.5 is gone.
#
# T5 multiplies what a tied head reads by d_model ** -0.5. In 4.57.6 the class of mT5 does so too; in 5.24.0 only that of T5
# does (by scale_decoder_outputs, which a configuration of mT5 has not). So one folder, read without a word by both, has
# logits sqrt(d_model) times as large: the likeliest id stays, probabilities, sampling and the scores of beams do not.
# Seen, with d_model 64: T5 0.125 and 0.125; mT5 0.125 with 4.57.6 and 1.0 with 5.24.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/factor.py" <<'PYTHON'
import os
import sys

import torch
import transformers
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

transformers.logging.set_verbosity_error()
shape = dict(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0)
factors = {}
for name, make_config, make in (
    ("t5", T5Config, T5ForConditionalGeneration),
    ("mt5", MT5Config, MT5ForConditionalGeneration),
):
    folder = f"{sys.argv[1]}/{name}"
    if not os.path.exists(folder):
        torch.manual_seed(0)
        make(make_config(**shape, tie_word_embeddings=True)).save_pretrained(folder)
    model = make.from_pretrained(folder).eval()
    assert model.lm_head.weight is model.shared.weight
    with torch.no_grad():
        answer = model(
            input_ids=torch.tensor([[5, 6, 1]]), decoder_input_ids=torch.tensor([[0, 7]]), output_hidden_states=True
        )
        plain = answer.decoder_hidden_states[-1] @ model.lm_head.weight.T
    factors[name] = round((answer.logits / plain).mean().item(), 4)
print(transformers.__version__, "| what a tied head's logits are multiplied by:", factors)
expected = {"t5": 0.125, "mt5": 0.125 if transformers.__version__.startswith("4.") else 1.0}
assert factors == expected, "it behaves otherwise now"
PYTHON
for version in 4.57.6 5.24.0; do
  ${PYTHON:-python3} -m venv "$folder/venv-$version"
  "$folder/venv-$version/bin/pip" install --quiet "torch==2.13.0" "transformers==$version"
  "$folder/venv-$version/bin/python" "$folder/factor.py" "$folder/models"
done
