"""Writes tests/data/la_canine_golden.*: what wtpsplit 2.2.2 makes of small random LA-CANINEs.

Run from the checkout's root in an environment with wtpsplit 2.2.2 and torch: python tests/peers/make_la_canine_golden.py
Weights are those of canine_cases.py. `.safetensors` holds some rows of the scores; `.json` the names and shapes of the
parameters, and for ten languages the first bytes of text of the shipped sample with the ends of their sentences.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import wtpsplit
import wtpsplit.models  # noqa: F401 (registers the architecture)
from safetensors.torch import save_file
from wtpsplit.configs import LACanineConfig
from wtpsplit.extract import PyTorchWrapper
from wtpsplit.models import LACanineForTokenClassification
from wtpsplit.utils import Constants, hash_encode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from canine_cases import LA_CASES, LA_KINDS, LA_LANGUAGES, LA_TINY, batch, give_weights, sample_text  # noqa: E402

EVERY = 41
ENDS = 0.02  # of the characters end a sentence, about


def model_of(kind):
    model = LACanineForTokenClassification(LACanineConfig(**LA_TINY, **LA_KINDS[kind])).eval()
    return model, give_weights(model)


def scores(model, lengths, total, language):
    ids, mask = batch(lengths, total)
    hashed = np.stack([hash_encode(row, LA_TINY["num_hash_functions"], LA_TINY["num_hash_buckets"]) for row in ids])
    hashed[~mask] = 0
    adapters = {"language_ids": torch.full((len(lengths),), language)} if model.config.language_adapter == "on" else {}
    with torch.no_grad():
        logits = model(hashed_ids=torch.from_numpy(hashed), attention_mask=torch.from_numpy(mask).float(), **adapters).logits
    return torch.cat([logits[:, ::EVERY], logits[:, -1:]], dim=1).contiguous()


def main():
    assert wtpsplit.__version__ == "2.2.2", wtpsplit.__version__
    tensors, shapes = {}, {}
    for kind in LA_KINDS:
        model, shapes[kind] = model_of(kind)
        for lengths, total in LA_CASES:
            key = f"{kind}.{total}.{'.'.join(map(str, lengths))}"
            tensors[key] = scores(model, lengths, total, Constants.LANG_CODE_TO_INDEX["cs"])
    file = ROOT / "tests/data/la_canine_golden.safetensors"
    save_file(tensors, file)
    file.chmod(0o644)

    model, _ = model_of("on")
    splitter = wtpsplit.WtP(PyTorchWrapper(model), ignore_legacy_warning=True)
    texts = {}
    for language, name in LA_LANGUAGES.items():
        text = sample_text(name)
        found = splitter.predict_proba(text, lang_code=language, stride=64)
        threshold = round(float(np.quantile(found, 1 - ENDS)), 4)
        parts = list(splitter.split(text, lang_code=language, threshold=threshold))
        assert "".join(parts) == text
        ends = np.cumsum([len(part.encode()) for part in parts]).tolist()
        texts[language] = {"threshold": threshold, "ends": ends}
        print(language, len(text), len(parts), threshold)
    document = {"shapes": shapes, "languages": texts}
    (ROOT / "tests/data/la_canine_golden.json").write_text(json.dumps(document, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
