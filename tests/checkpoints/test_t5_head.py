"""The head of a T5: every combination of flags, names and versions has the logits of the transformers that wrote it."""

import json
import warnings
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from t5_heads import COMBINATIONS, FLAGS, GOLDEN, SOURCE, STORED, TARGET, VERSIONS, Combination, write

from marlin_cli import load
from marlin_cli.errors import AssumptionWarning, CheckpointError, ConfigError

TOLERANCE = 1e-5
PLAIN = Combination("t5", True, None, None, "table")


@cache
def golden(version):
    """Key of a combination -> the logits of transformers, or None where it has none."""
    table = json.loads((GOLDEN / f"{version}.json").read_text())
    arrays = {key: np.array(array) for key, array in mx.load(str(GOLDEN / f"{version}.safetensors")).items()}
    return {key: None if number is None else arrays[str(number)] for key, number in table.items()}


def logits(path):
    return np.array(load(path, device="cpu").logits(SOURCE, TARGET))


def test_the_table_is_whole():
    assert len(COMBINATIONS) == 216
    for version in VERSIONS:
        found = golden(version)
        assert found.keys() == {each.key for each in COMBINATIONS}
        distinct = {array.tobytes() for array in found.values() if array is not None}
        assert len(distinct) == {"4.57.6": 6, "5.24.0": 8}[version]  # with a gate and without: tied or own, scaled or not


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("model_type", ["t5", "mt5"])
@pytest.mark.parametrize("stored", STORED)
def test_the_logits_of_the_version_that_wrote_it(model_type, gated, stored, version, tmp_path):
    for tie in FLAGS:
        for scale in FLAGS:
            combination = Combination(model_type, gated, tie, scale, stored)
            expected = golden(version)[combination.key]
            folder = write(tmp_path, combination, version)
            if expected is None:
                with pytest.raises(CheckpointError, match=r"the tensor '(lm_head|shared)\.weight' is missing"):
                    load(folder, device="cpu")
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AssumptionWarning)
                assert np.abs(logits(folder) - expected).max() < TOLERANCE, combination.key


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda each: each.key)
def test_without_a_version_transformers_5_is_assumed_aloud(combination, tmp_path):
    folder = write(tmp_path, combination, None)
    four, five = (golden(version)[combination.key] for version in VERSIONS)
    alike = four is not None and np.abs(four - five).max() < TOLERANCE
    # Only transformers 5 writes the flag. Of a head without a table it and 4 are told apart by what is missing.
    told = combination.scale_decoder_outputs is not None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = logits(folder)
    assert np.abs(found - five).max() < TOLERANCE
    said = [each for each in caught if each.category is AssumptionWarning]
    if told or alike:
        assert not said
    elif combination.stored != "head alone":
        (warning,) = said
        assert str(warning.message).startswith(str(folder)) and "read as by transformers 5" in str(warning.message)


def test_a_head_that_transformers_4_leaves_out_is_named(tmp_path):
    folder = write(tmp_path, PLAIN._replace(stored="table and own head"), "4.57.6")
    with pytest.warns(AssumptionWarning, match=r"'lm_head\.weight' is left out.*without tie_word_embeddings"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("model_type", "tie", "said"),
    [("t5", False, "with tie_word_embeddings false"), ("mt5", None, "without tie_word_embeddings")],
)
def test_a_missing_head_is_refused_for_what_config_json_says(model_type, tie, said, tmp_path):
    folder = write(tmp_path, PLAIN._replace(model_type=model_type, tie_word_embeddings=tie), "4.30.0")
    with pytest.raises(CheckpointError, match=rf"'lm_head\.weight' is missing; {said}.* transformers '4\.30\.0'"):
        load(folder, device="cpu")


@pytest.mark.parametrize("version", ["5.24.0", "5.0.0.dev0", "10.1", "4.57.6", "4.7.0.dev0", "four", "", 4, None])
def test_versions_as_they_are_written(version, tmp_path):
    """mt5 with tied weights is scaled by 4 and not by 5."""
    combination = PLAIN._replace(model_type="mt5", tie_word_embeddings=True)
    folder = write(tmp_path, combination, version)
    major = 4 if str(version).startswith("4.") else 5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load(folder, device="cpu").config.scaled_head == (major == 4)
    assert bool(caught) == (version in ("four", "", 4, None))


@pytest.mark.parametrize("model_type, gated", [("t5", False), ("mt5", True)])
def test_what_is_left_out_is_by_the_model_type(model_type, gated, tmp_path):
    folder = write(tmp_path, PLAIN._replace(model_type=model_type, gated=gated), "5.24.0")
    document = json.loads((folder / "config.json").read_text())
    del document["feed_forward_proj"]
    (folder / "config.json").write_text(json.dumps(document))
    assert np.abs(logits(folder) - golden("5.24.0")[PLAIN._replace(model_type=model_type, gated=gated).key]).max() < TOLERANCE


@pytest.mark.parametrize("flag", ["tie_word_embeddings", "scale_decoder_outputs"])
@pytest.mark.parametrize("value", [None, "false", 0, [True], {}])
def test_a_flag_is_true_or_false(flag, value, tmp_path):
    folder = write(tmp_path, PLAIN, "5.24.0")
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {flag: value}))
    with pytest.raises(ConfigError, match=f"config.json: {flag} should be true or false, found {type(value).__name__}"):
        load(folder, device="cpu")


def test_a_packed_head_is_one_of_its_own(tmp_path):
    """As other tools may pack it with all other layers."""
    from marlin_cli.checkpoints.foreign import Foreign, Taken
    from marlin_cli.checkpoints.hugging_face import _take_head
    from marlin_cli.checkpoints.t5_head import HeadFlags

    packed = {"lm_head.weight": mx.zeros((260, 4), mx.uint32), "lm_head.scales": mx.zeros((260, 2), mx.uint8)}
    weights = {"embedding.weight": mx.zeros((260, 32))}
    flags = HeadFlags("t5", False, None, "4.57.6")
    assert _take_head(weights, Taken(Foreign(tmp_path, packed)), tmp_path, flags) == (False, False)
    assert weights.keys() == {"embedding.weight", "output.weight", "output.scales"}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_marlin_saves_has_the_same_logits(version, tmp_path):
    heads = [(tie, scale, stored) for tie in (True, False) for scale in FLAGS for stored in ("table", "table and own head")]
    seen = set()
    for tie, scale, stored in heads:
        combination = Combination("t5", True, tie, scale, stored)
        if golden(version)[combination.key] is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AssumptionWarning)
            model = load(write(tmp_path / "theirs", combination, version), device="cpu")
        seen.add((model.config.tied_head, model.config.scaled_head))
        model.save(tmp_path / "ours", overwrite=True)
        assert np.array_equal(logits(tmp_path / "ours"), np.array(model.logits(SOURCE, TARGET)))
    assert len(seen) == {"4.57.6": 2, "5.24.0": 4}[version]
