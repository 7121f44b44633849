"""The table of ByT5's methods: bits over target bytes, shares of MLX's own in the same format, other settings left out."""

import json

import byt5_methods as methods
import numpy as np
import pytest
from paired_losses import KeptLosses

SETTING = ("byt5-demo", 12, 0, 3)


def test_losses_are_over_target_bytes_and_shares_are_of_rtn_with_all_layers_alike(tmp_path):
    results = tmp_path / "results.jsonl"
    rows = [
        ((*SETTING, "16-bit"), [1.0, 2.0, 3.0]),
        ((*SETTING, "alike", "nvfp4", "rtn"), [1.4, 2.8, 4.2]),
        ((*SETTING, "alike", "nvfp4", "gptq"), [1.1, 2.2, 3.3]),
        ((*SETTING, "encoder", "nvfp4", "rtn"), [1.2, 2.4, 3.6]),
        ((*SETTING, "alike", "mxfp4", "rtn"), [1.6, 1.8, 3.2]),  # within two standard errors of none: no share of it is said
        ((*SETTING, "alike", "mxfp4", "gptq"), [1.1, 2.2, 3.3]),
        (("byt5-demo", 40, 0, 3, "alike", "int4", "rtn"), [9.0, 9.0, 9.0]),
    ]
    results.write_text("".join(json.dumps({"key": key, "bits": bits, "machine": "here"}) + "\n" for key, bits in rows))
    losses = KeptLosses(results, np.array([2.0, 4.0, 6.0]), lambda model: pytest.fail("measured again"))
    assert losses.measure((*SETTING, "16-bit"), lambda: pytest.fail("made again")).tolist() == [1.0, 2.0, 3.0]
    text = methods.table(losses, SETTING)
    assert "3 held-out segments of 12 bytes, 0.50000 bits per target byte" in text
    assert [line for line in text.splitlines() if line.startswith("| ")][1:] == [
        "| all layers alike | rtn (MLX's own) | 0.2000 ± 0.0000 | 0.0500 ± 0.0661 |  |  |",
        "| all layers alike | gptq | 0.0500 ± 0.0000 (25%) | 0.0500 ± 0.0000 |  |  |",
        "| encoder as named, decoder and cross mxfp8 | rtn (MLX's own) | 0.1000 ± 0.0000 (50%) |  |  |  |",
    ]
