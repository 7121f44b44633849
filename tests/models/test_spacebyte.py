"""SpaceByte: where patches begin, what a prediction does not see, what it is made of for calibration, and what is refused."""

import mlx.core as mx
import numpy as np
import pytest
from spacebyte_cases import SIZES, random_spacebyte

from marlin_cli.config import from_mapping
from marlin_cli.errors import ConfigError, QuantizationError, UsageError
from marlin_cli.models import linear_layers, part_of, preset, shared_inputs
from marlin_cli.models.spacebyte_config import SpaceByteConfig
from marlin_cli.models.spacebyte_patches import Before, between_words, patches_begun
from marlin_cli.models.spacebyte_steps import SPACEBYTE, ids_of_prompt
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.statistics.collect import measure

WINDOWS = np.frombuffer(b"Of words, 3 and  more; caf\xc3\xa9 " * 2, dtype=np.uint8).reshape(2, -1)


def begun(data, before=None, **changes):
    ids = np.frombuffer(data, np.uint8).astype(np.int64)[None]
    return patches_begun(ids, SpaceByteConfig(**{**SIZES, **changes}), before or Before.nothing(1))


def test_what_stands_between_words():
    found = between_words(np.arange(300))
    inside = {*range(48, 58), *range(65, 91), *range(97, 123), *range(128, 192)}
    assert {int(each) for each in np.flatnonzero(~found)} == inside


@pytest.mark.parametrize(
    ("data", "places"),
    [
        (b"\xffab cd", [0, 3]), (b"\xffa, b", [0, 2]), (b"a\xc3\xa9b", [1]), (b"a \xc3\xa9", [1]), (b"\xff\xff", [0, 1]),
        (b" \xff", [0, 1]), (b"ab", []), (b"@[`{/:", [0]),
    ],
)  # fmt: skip
def test_where_patches_begin(data, places):
    assert np.flatnonzero(begun(data).first[0]).tolist() == places


@pytest.mark.parametrize("rule", ["utf8", "periodic"])
def test_ids_that_come_in_pieces_begin_the_same_patches(rule):
    data = b"\xffWords,  and\xe6\x9d\xb1 (more) of them"
    whole = begun(data, patch_rule=rule, max_patches=4)
    for cut in (0, 1, 7, 8, 9, 12, len(data)):
        head = begun(data[:cut], patch_rule=rule, max_patches=4)
        tail = begun(data[cut:], head.after, patch_rule=rule, max_patches=4)
        for name in ("first", "beyond"):
            parts = [getattr(each, name) for each in (head, tail)]
            assert np.array_equal(np.concatenate(parts, axis=1), getattr(whole, name))
        assert np.array_equal(tail.after.patches, whole.after.patches)


def test_a_text_ends_where_it_has_no_room_for_a_patch():
    network = random_spacebyte(max_patches=3)
    data = mx.array([list(b"a b c d e")])
    logits = network(network.led(data))[0]
    assert mx.argmax(logits[-3:], axis=-1).tolist() == [255] * 3 and mx.abs(logits[5]).max().item() < 1e3
    assert logits[6, 255].item() == 1e4  # the space before d
    assert mx.abs(network.predictions(data)).max().item() < 1e3  # what is scored has no such end
    with pytest.raises(UsageError, match="the prompt has 5 patches, .* the model room for 3; shorten the prompt"):
        ids_of_prompt(network.config, b"a b c d e", False)


def test_a_prediction_does_not_see_what_follows():
    network = random_spacebyte()
    data = mx.array(WINDOWS.astype(np.int32))
    changed = mx.concatenate([data[:, :12], data[:, 12:] * 0], axis=1)
    same = mx.abs(network.predictions(data) - network.predictions(changed)).max(axis=(0, 2))
    assert mx.abs(same[:13]).max().item() < 1e-5 < same[13:].max().item()


def test_pieces_are_the_network_and_show_every_layer():
    network = random_spacebyte()
    state, shown = SPACEBYTE.start(network, WINDOWS), []
    for piece in SPACEBYTE.pieces(network):
        state = piece.run(network, state)
        shown += piece.sources
    logits = network.head(network.norm(state["rows"])).reshape(-1, 256)
    assert mx.allclose(logits, SPACEBYTE.logits(network, WINDOWS), atol=1e-5)
    assert sorted(shown) == sorted(set(shared_inputs(network).values()) - {"output"})


def test_bytes_are_measured_by_their_place_in_a_patch():
    network = random_spacebyte()
    totals = measure(network, "text", WINDOWS[0])
    rows = {path: moments.count.tolist() for path, moments in totals.inputs.items()}
    # The mark and "Of"; " words", ", 3", " and", "  more", "; caf", "é"; of the last byte, a space, nothing is read.
    assert rows["global.layers.0.attention.q_proj"] == [[7]]
    (of_bytes,) = rows["initial.layers.0.ffn.up_proj"]
    assert of_bytes[0] == 7 and sum(of_bytes) == WINDOWS.shape[1] and len(of_bytes) == 8


def test_parts_and_formats():
    settings, layers = QuantizationSettings(), linear_layers(random_spacebyte())
    assert {part_of(path) for path in layers} == {"global", "local", "head"}
    formats = {path: settings.format_for(path) for path in layers}
    assert formats["initial.layers.0.ffn.up_proj"] == formats["final.layers.0.attention.q_proj"] == "mxfp8"
    assert formats["global.layers.0.ffn.up_proj"] == "nvfp4"


def test_it_cannot_be_turned():
    with pytest.raises(QuantizationError, match="a SpaceByte cannot be rotated"):
        SPACEBYTE.rotation(random_spacebyte().config)


def test_the_preset_is_the_default():
    assert preset("spacebyte-250m") == SpaceByteConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 255}, "vocab_size must be at least 256"),
        ({"local_dim": 128}, "local_dim 128 is more than global_dim 64"),
        ({"global_heads": 3}, "global_heads 3 do not divide global_dim 64; give the head_dim"),
        ({"local_kv_heads": 3}, "local_kv_heads 3 do not divide 2 heads"),
        ({"positions": "learned+rope", "local_head_dim": 5}, "rope needs heads of an even width, found 5"),
        ({"patch_rule": "periodic", "max_patches": 7}, "max_patches 7 do not divide the 128 ids"),
        ({"initial_layers": 0, "final_layers": 0}, "layers must be at least 1"),
        ({"max_bytes": 1 << 40}, "max_bytes is"),
        ({"start_id": 256}, "start_id is 256, more than the 255"),
        ({"attention_scale": float("nan")}, "attention_scale"),
        ({"patch_rule": "space"}, "patch_rule"),
    ],
)
def test_impossible_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(SpaceByteConfig, {**SIZES, **changes}, "config.json")
