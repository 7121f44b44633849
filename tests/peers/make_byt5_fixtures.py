"""Writes tests/data/byt5: tiny random checkpoints saved by transformers, and what it makes of them.

Run from the checkout's root with the extra `peers`: python tests/peers/make_byt5_fixtures.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import T5Config, T5ForConditionalGeneration

DATA = Path(__file__).parents[1] / "data" / "byt5"
SOURCES = [b"bytes \x00\xff", b"another, longer input"]
TARGET = b"target"
MOST_IDS = 12
TINY = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}
MODELS = {
    "gated": {"vocab_size": 384, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0},
    "relu": {"vocab_size": 260, "feed_forward_proj": "relu", "tie_word_embeddings": True, "decoder_start_token_id": 259},
}


def padded(rows):
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


@torch.no_grad()
def main():
    for seed, (name, options) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(T5Config(**TINY, **options)).eval()
        if not options["tie_word_embeddings"]:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
        for part, parameter in model.named_parameters():
            if "EncDecAttention.o" in part:
                parameter.mul_(8)
        folder = DATA / name
        model.save_pretrained(folder)
        if options["tie_word_embeddings"]:
            torch.save(model.state_dict(), folder / "pytorch_model.bin")  # the embeddings under all their names
            (folder / "model.safetensors").unlink()
        rows = [[byte + 3 for byte in source] + [1] for source in SOURCES]
        ids, mask = padded(rows), padded([[1] * len(row) for row in rows])
        target = torch.tensor([[options["decoder_start_token_id"], *[byte + 3 for byte in TARGET]]])
        own = model(input_ids=ids[:1, : len(rows[0])], decoder_input_ids=target)
        made = {"max_new_tokens": MOST_IDS, "do_sample": False, "input_ids": ids, "attention_mask": mask}
        save_file(
            {
                "states": own.encoder_last_hidden_state[0, :-1].contiguous(),
                "logits": own.logits[0].contiguous(),
                "greedy": model.generate(**made, num_beams=1)[:, 1:].contiguous(),
                "beams": model.generate(**made, num_beams=4)[:, 1:].contiguous(),
            },
            DATA / f"{name}.safetensors",
        )


if __name__ == "__main__":
    main()
