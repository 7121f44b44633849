"""Writes tests/data/canine_golden.safetensors: what transformers 4.57.6 makes of a small random CANINE with each head.

Run from the checkout's root in an environment with transformers 4.57.6 and torch: python tests/peers/make_canine_golden.py
Weights and inputs are those of canine_cases.py, so the file holds some rows of the results alone, and in its metadata
the names and shapes of each model's parameters.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from canine_cases import TINY, batch, cases, give_weights  # noqa: E402

EVERY = 41  # of the states, each so manieth row and the last one


def rows(states):
    """Some of the positions [n, some, width]."""
    return torch.cat([states[:, ::EVERY], states[:, -1:]], dim=1)


@torch.no_grad()
def main():
    assert transformers.__version__ == "4.57.6", transformers.__version__
    tensors, shapes = {}, {}
    for kind in ("TokenClassification", "SequenceClassification", "QuestionAnswering", "MultipleChoice"):
        labels = 2 if kind == "QuestionAnswering" else 3
        model = getattr(transformers, f"CanineFor{kind}")(transformers.CanineConfig(**TINY, num_labels=labels)).eval()
        shapes[kind] = give_weights(model)
        for lengths, total in cases():
            ids, mask = (torch.from_numpy(array) for array in batch(lengths, total))
            types = torch.zeros_like(ids)
            types[:, total // 2 :] = 1
            key = f"{kind}.{total}.{'.'.join(map(str, lengths))}"
            arguments = {"attention_mask": mask.long(), "token_type_ids": types}
            if kind == "MultipleChoice":
                arguments = {name: value[None] for name, value in arguments.items()}
                tensors[f"{key}.logits"] = model(ids[None], **arguments).logits[0]
                continue
            if kind == "TokenClassification":
                body = model.canine(ids, **arguments)
                tensors[f"{key}.states"] = rows(body.last_hidden_state)
                tensors[f"{key}.pooled"] = body.pooler_output
            output = model(ids, **arguments)
            if kind == "QuestionAnswering":
                tensors[f"{key}.logits"] = rows(torch.stack([output.start_logits, output.end_logits], dim=-1))
            else:
                tensors[f"{key}.logits"] = rows(output.logits) if output.logits.ndim == 3 else output.logits
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    file = ROOT / "tests/data/canine_golden.safetensors"
    save_file(tensors, file, {"shapes": json.dumps(shapes)})
    file.chmod(0o644)


if __name__ == "__main__":
    main()
