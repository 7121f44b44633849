#!/usr/bin/env bash
# A CANINE's states of real characters depend on how much padding follows them, attention mask or not.
#
# The mask is down-sampled with the characters, four to one, by a window that begins at the mask's first place, and the local
# attention's blocks and the strided convolution see what fills the last group of four. So a text alone and the same text
# in a padded batch have different states, which no other encoder of transformers shows.
# Seen with transformers 5.24.0, random weights: differences as large as the states themselves (2.4 of at most 2.9).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import CanineConfig, CanineModel

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = CanineConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
model = CanineModel(config).eval()
text = [0xE000, *map(ord, "hello wo"), 0xE001]


@torch.no_grad()
def states(padding):
    ids = torch.tensor([text + [0] * padding])
    mask = torch.tensor([[1] * len(text) + [0] * padding])
    return model(ids, attention_mask=mask).last_hidden_state[:, : len(text)]


alone = states(0)
for padding in (4, 128):
    far = (states(padding) - alone).abs().max().item()
    print(f"{padding} more places: states differ by {far:.2f}, the largest is {alone.abs().max().item():.2f}")
    assert far > 0.1, "transformers behaves otherwise now"
PYTHON
