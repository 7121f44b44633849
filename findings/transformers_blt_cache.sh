#!/usr/bin/env bash
# BltForCausalLM of transformers 5.24 cannot generate as it comes, and with its cache it writes other bytes than without.
#
# generate() asks the configuration for num_hidden_layers, which a Blt has in each of its parts and not as a whole: an
# AttributeError, while use_cache=False works. Who sets that number by hand gets a cache that holds too little of the bytes
# before: greedy bytes part from those of the passes over the whole text after a few.
# Seen with transformers 5.24.0 and torch 2.13.0, random weights: the third of eight bytes is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0"
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import torch
from transformers import BltConfig, BltForCausalLM

part = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
local = part | {"hidden_size_global": 64, "cross_attn_k": 2}
config = BltConfig(
    patcher_config=part, encoder_config=local, decoder_config=local, global_config=part | {"hidden_size": 64}, cross_attn_k=2,
    encoder_hash_byte_group_size=[3, 4], encoder_hash_byte_group_vocab=97, patching_threshold=1.0,
)
torch.manual_seed(0)
model = BltForCausalLM(config).eval()
ids = torch.tensor([[1, *(byte + 4 for byte in b"Bytes, and more of them")]])


def greedy(**cache):
    return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **cache)[0, ids.shape[1] :].tolist()


whole, said = greedy(use_cache=False), "nothing"
try:
    greedy()
except AttributeError as error:
    said = str(error)
print("generate() as it comes says:", said)
config.num_hidden_layers = 1
cached = greedy()
print("without a cache:", whole)
print("with one:       ", cached)
assert "num_hidden_layers" in said and cached != whole, "transformers behaves otherwise now"
PYTHON
