"""The tables of ByT5's methods: divergence and bits over target bytes, shares of MLX's own, other settings left out."""

import json

import byt5_cases
import byt5_methods as methods
import mlx.core as mx
import numpy as np
import pytest
from paired_losses import KeptLosses

from marlin_cli import ByT5Model
from marlin_cli.corpus import Pair
from marlin_cli.ops.device import choose_device
from marlin_cli.quality.pairs import bits_of_pairs
from marlin_cli.quantization.apply import dequantize_network, quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

SETTING = ("byt5-demo", 12, 0, 3)


def test_losses_are_over_target_bytes_and_shares_are_of_rtn_with_all_layers_alike(tmp_path):
    results = tmp_path / "results.jsonl"
    rows = [
        ((*SETTING, "16-bit"), [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
        ((*SETTING, "alike", "nvfp4", "rtn"), [1.4, 2.8, 4.2], [0.2, 0.4, 0.6]),
        ((*SETTING, "alike", "nvfp4", "gptq"), [1.1, 2.2, 3.3], [0.1, 0.2, 0.3]),
        ((*SETTING, "encoder", "nvfp4", "rtn"), [1.2, 2.4, 3.6], [0.15, 0.3, 0.45]),
        ((*SETTING, "alike", "nvfp4", "sequential+distill 7"), [1.1, 2.2, 3.3], [0.05, 0.1, 0.15]),
        ((*SETTING, "alike", "nvfp4", "sequential+distill 8"), [9.0, 9.0, 9.0], [9.0, 9.0, 9.0]),
        ((*SETTING, "auto 5", "nvfp4", "gptq"), [1.0, 2.0, 3.0], [0.02, 0.04, 0.06]),
        # Within two standard errors of none in bits: no share of it is said.
        ((*SETTING, "alike", "mxfp4", "rtn"), [1.6, 1.8, 3.2], [0.6, 0.4, 0.8]),
        ((*SETTING, "alike", "mxfp4", "gptq"), [1.1, 2.2, 3.3], [0.3, 0.2, 0.4]),
        (("byt5-demo", 40, 0, 3, "alike", "int4", "rtn"), [9.0, 9.0, 9.0], [9.0, 9.0, 9.0]),
    ]
    names = "key", "bits", "divergence"
    results.write_text("".join(json.dumps({**dict(zip(names, row, strict=True)), "machine": "here"}) + "\n" for row in rows))
    losses = KeptLosses(results, np.array([2.0, 4.0, 6.0]), lambda model: pytest.fail("measured again"))
    assert losses.measure((*SETTING, "16-bit"), lambda: pytest.fail("made again")).tolist() == [1.0, 2.0, 3.0]
    text = methods.tables(methods.Options(results, 5.0, 7), losses, SETTING)
    assert "3 held-out segments of 12 bytes, 0.50000 bits per target byte" in text
    divergences, bits = text.split("Bits more than in 16 bits:")
    assert [line for line in divergences.splitlines() if line.startswith("| ")][1:] == [
        "| all layers alike | rtn (MLX's own) | 0.10000 ± 0.00000 | 0.15000 ± 0.03819 |  |  |",
        "| all layers alike | gptq | 0.05000 ± 0.00000 (50%) | 0.07500 ± 0.01909 (50%) |  |  |",
        "| all layers alike | gptq, sequential, 7 steps of distillation | 0.02500 ± 0.00000 (25%) |  |  |  |",
        "| encoder as named, decoder and cross mxfp8 | rtn (MLX's own) | 0.07500 ± 0.00000 (75%) |  |  |  |",
        "| auto, 5 bits a weight | gptq | 0.01000 ± 0.00000 (10%) |  |  |  |",
    ]
    assert [line for line in bits.splitlines() if line.startswith("| ")][1:4] == [
        "| all layers alike | rtn (MLX's own) | 0.2000 ± 0.0000 | 0.0500 ± 0.0661 |  |  |",
        "| all layers alike | gptq | 0.0500 ± 0.0000 (25%) | 0.0500 ± 0.0000 |  |  |",
        "| all layers alike | gptq, sequential, 7 steps of distillation | 0.0500 ± 0.0000 (25%) |  |  |  |",
    ]


def test_the_demo_is_float32_on_the_device_that_was_asked_for(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(methods.ByT5Model, "from_pretrained", lambda path, **options: asked.update(options))
    methods.Packing(methods.Options(tmp_path / "results.jsonl", 5.0, 1, device="cuda"))
    assert asked == {"device": "cuda", "dtype": mx.float32}


def test_each_pair_is_scored_as_if_alone_and_in_its_place():
    network = byt5_cases.random_byt5()
    model = ByT5Model(network, choose_device("cpu"))
    pairs = [Pair(each.source, each.target) for each in byt5_cases.examples(5, 9)]
    scoring = methods.Scoring(pairs)
    scoring.of_original(model)
    same = scoring.score(model)
    np.testing.assert_allclose(same["bits"], bits_of_pairs(model, pairs), rtol=1e-4)
    np.testing.assert_allclose(same["divergence"], 0, atol=1e-6)
    packed = dequantize_network(quantize_network(network, QuantizationSettings()).network, model.device.dtype)
    found = scoring.score(ByT5Model(packed, model.device))
    assert (found["divergence"] > 0).all()
    for place in (0, 4, 8):
        alone = methods.Scoring([pairs[place]])
        alone.of_original(model)
        one = alone.score(ByT5Model(packed, model.device))
        assert one["divergence"][0] == pytest.approx(found["divergence"][place], rel=1e-3)
