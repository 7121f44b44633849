"""Writes tests/data/t5_heads/VERSION.*: the logits of the installed transformers for every combination of a T5's head.

Run from the checkout's root in an environment with one of the versions that `t5_heads.VERSIONS` names, torch and numpy:
python tests/peers/make_t5_heads.py

`.json` names for each combination the array of `.safetensors` that holds its logits [target + 1, vocabulary]; null where
transformers leaves weights random or without values, as none is stored.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))

from t5_heads import COMBINATIONS, GOLDEN, SOURCE, TARGET, Combination, write, write_tensors  # noqa: E402


@torch.no_grad()
def logits_of(folder: Path, combination: Combination) -> np.ndarray | None:
    """What transformers makes of a folder."""
    classes = {"t5": transformers.T5ForConditionalGeneration, "mt5": transformers.MT5ForConditionalGeneration}
    write(folder, combination, transformers.__version__)
    model, info = classes[combination.model_type].from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"] or any(parameter.is_meta for parameter in model.parameters()):
        return None
    source = torch.tensor([[*(byte + 3 for byte in SOURCE), 1]])
    target = torch.tensor([[0, *(byte + 3 for byte in TARGET)]])
    return model.eval()(input_ids=source, decoder_input_ids=target).logits[0].numpy()


def main() -> None:
    transformers.logging.set_verbosity_error()
    table, arrays = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for combination in COMBINATIONS:
            logits = logits_of(Path(folder), combination)
            known = None if logits is None else next((n for n, each in enumerate(arrays) if np.allclose(each, logits)), None)
            if logits is not None and known is None:
                known = len(arrays)
                arrays.append(logits)
            table[combination.key] = known
    GOLDEN.mkdir(exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
    (GOLDEN / f"{transformers.__version__}.json").write_text(f"{{\n{lines}\n}}\n")
    named = {str(number): array for number, array in enumerate(arrays)}
    write_tensors(GOLDEN / f"{transformers.__version__}.safetensors", named)


if __name__ == "__main__":
    main()
