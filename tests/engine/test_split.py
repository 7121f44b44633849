"""Networks that ranks share: on each what one process gives, in less memory; what does not divide is refused with a reason."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import shared_models
from mlx.utils import tree_flatten
from ring import ended, ring

from marlin_cli.api import MegaByteModel
from marlin_cli.checkpoints import parts, read_checkpoint
from marlin_cli.config import from_mapping
from marlin_cli.engine import whole_patches
from marlin_cli.errors import UsageError
from marlin_cli.models import ARCHITECTURES
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.models.splitting import Share
from marlin_cli.ranks import ALONE

PROGRAM = shared_models.__file__


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models")
    for name in shared_models.CASES:
        shared_models.write(folder, name)
    return folder


@pytest.fixture(scope="module")
def shared(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks saw of all cases."""
    with ring([PROGRAM, "share", str(folder)], folder) as processes:
        results = ended(processes)
    assert [(code, errors) for code, _, errors in results] == [(0, ""), (0, "")]
    return [json.loads(out) for _, out, _ in results]


@pytest.mark.parametrize("name", shared_models.CASES)
def test_two_ranks_give_what_one_process_gives(name: str, folder: Path, shared: list[dict[str, Any]]) -> None:
    alone = shared_models.seen(folder, name, ALONE)
    first, second = (each[name] for each in shared)
    assert first == second
    for mine, theirs in zip(alone["values"], first["values"], strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=2e-4, atol=2e-4)
    assert first["texts"] == alone["texts"]


def test_of_a_model_that_is_mostly_global_a_rank_holds_about_half(folder: Path, shared: list[dict[str, Any]]) -> None:
    whole = shared_models.seen(folder, "dense", ALONE)["held"]
    assert all(each["dense"]["held"] < 0.6 * whole for each in shared)


def test_what_is_shared_is_held_once(folder: Path, shared: list[dict[str, Any]]) -> None:
    for name in ("nvfp4", "int8"):
        path = folder / name
        checkpoint = read_checkpoint(path)
        config = from_mapping(MegaByteConfig, checkpoint.config, name)
        cuts = [share(config, 2, rank).cuts(config, checkpoint.weights, name) for rank in range(2)]
        whole = shared_models.seen(folder, name, ALONE)["held"]
        halved = sum(checkpoint.weights[path].nbytes for path in cuts[0]) // 2
        assert [each[name]["held"] for each in shared] == [whole - halved] * 2


def test_a_rank_that_draws_other_bytes_ends_all(folder: Path) -> None:
    with ring([PROGRAM, "differ", str(folder)], folder) as processes:
        first, second = ended(processes)
    assert (first[0], second[0], _own_lines(second[2])) == (1, 1, [])
    [line] = _own_lines(first[2])
    assert line.startswith("marlin: rank 1 has drawn other bytes than rank 0: ranks that share a model need its same files")


def _own_lines(errors: str) -> list[str]:
    """Without those of MLX's ring, which a rank may be waiting in when another ends."""
    return [line for line in errors.splitlines() if not line.startswith("[ring]")]


def test_a_rank_that_dies_while_all_compute_ends_the_others_within_two_seconds(folder: Path) -> None:
    with ring([PROGRAM, "die", str(folder)], folder) as (first, second):
        second.wait(timeout=60)
        begun = time.monotonic()
        [(code, out, errors)] = ended([first])
        assert time.monotonic() - begun < 2
    assert (code, out) == (1, "decoded\n")
    assert errors.splitlines()[-1] == "marlin: rank 1 of 2 ended without finishing its share"  # after what the ring says


def weights_of(config: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(ARCHITECTURES[config.model_type].network(config).parameters()))


def share(config: Any, size: int, rank: int = 0) -> Share:
    split = ARCHITECTURES[config.model_type].split
    assert split is not None
    return Share(split, rank, size, None)


MEGABYTE = {
    "patch_size": 4,
    "max_bytes": 96,
    "global_layers": 1,
    "global_dim": 96,
    "local_layers": 1,
    "local_dim": 16,
    "local_heads": 2,
}


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        (MegaByteConfig(**MEGABYTE, global_heads=6), 4, "--split global: m has 6 heads, .* start 2 ranks"),
        (MegaByteConfig(**MEGABYTE, global_heads=6, global_ffn_dim=192), 4, "6 heads, which 4 ranks .* start 2 or 3 or 6"),
        (MegaByteConfig(**MEGABYTE, global_heads=2, global_ffn_dim=99), 2, "99 channels in a .* no number of ranks"),
        (MegaByteConfig(**MEGABYTE, global_heads=12, global_kv_heads=3, global_ffn_dim=96), 2, "3 heads of keys and values"),
        (ByT5Config(d_model=32, heads=6, head_dim=8, ffn_dim=96), 4, "--split encoder: .* start 2 or 3 or 6 ranks"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(config: Any, size: int, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        share(config, size).cuts(config, weights_of(config), "m")


def test_groups_that_do_not_divide_are_refused() -> None:
    config = MegaByteConfig(**MEGABYTE, global_heads=6, global_ffn_dim=192)
    widths = {"attention.o_proj": 3, "ffn.down_proj": 6}
    scales = {f"global.layers.0.{name}.scales": mx.zeros((96, width)) for name, width in widths.items()}
    with pytest.raises(UsageError, match="3 packed groups in a row of o_proj, which 2 ranks cannot share; start 3 ranks"):
        share(config, 2).cuts(config, {**weights_of(config), **scales}, "m")


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_hold_every_head_and_channel_once(size: int, kv_heads: int) -> None:
    config = MegaByteConfig(**{**MEGABYTE, "global_dim": 64}, global_heads=4, global_kv_heads=kv_heads, global_ffn_dim=64)
    weights = weights_of(config)
    cuts = [share(config, size, rank).cuts(config, weights, "m") for rank in range(size)]
    for name in cuts[0]:
        rows = mx.arange(weights[name].size).reshape(weights[name].shape)
        axis = len(cuts[0][name]) - 1
        parts = [rows[cut[name]] for cut in cuts]
        if "k_proj" in name or "v_proj" in name:
            parts = parts[:: max(1, size // kv_heads)]  # ranks that are more than heads hold one together
        assert mx.array_equal(mx.concatenate(parts, axis=axis), rows), name


def test_a_part_is_neither_saved_nor_packed(folder: Path, tmp_path: Path) -> None:
    class Two:
        rank, size, group = 0, 2, None

    model = MegaByteModel.from_pretrained(folder / "dense", device="cpu", split=Two())  # type: ignore[arg-type]
    for act in (lambda: model.save(tmp_path / "out"), lambda: model.quantize()):
        with pytest.raises(UsageError, match="holds a part of the model alone"):
            act()


@pytest.mark.parametrize(("device", "expected"), [("metal", None), ("cuda", "shared")])
def test_patches_of_a_model_that_ranks_share(device: str, expected: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLX compiles does not sum over ranks; CUDA kernels do."""

    class Two:
        rank, size, group = 0, 2, None

    model = MegaByteModel.from_pretrained(folder / "dense", device="cpu", split=Two())  # type: ignore[arg-type]
    monkeypatch.setattr(whole_patches, "gpu", lambda: device)
    monkeypatch.setattr(whole_patches, "compiled_patches", lambda *arguments: "alone")
    monkeypatch.setattr(whole_patches.cuda_patches, "patch_decoder", lambda *arguments: "alone")
    monkeypatch.setattr(whole_patches, "shared_patch_decoder", lambda *arguments: "shared")
    assert whole_patches.patch_decoder(model.network, 1) == expected
    monkeypatch.setenv("MARLIN_PATCHES", "operations")
    assert whole_patches.patch_decoder(model.network, 1) is None


@pytest.mark.parametrize("name", ["dense", "nvfp4", "biases int4"])
def test_of_marlins_own_layout_only_the_part_is_read(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_checkpoint(folder / name)
    config = from_mapping(MegaByteConfig, whole.config, name)
    monkeypatch.setattr(parts, "_copied", None)
    for rank in range(2):
        mine = share(config, 2, rank)
        cuts = mine.cuts(config, whole.weights, name)
        found = read_checkpoint(folder / name, wanted=lambda checkpoint: cuts)  # noqa: B023
        assert found.weights.keys() == whole.weights.keys()
        for path, array in whole.weights.items():
            assert found.weights[path].dtype == array.dtype
            assert mx.array_equal(found.weights[path], array[cuts[path]] if path in cuts else array)


def test_of_other_layouts_arrays_are_cut_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_checkpoint(folder / "nvfp4")
    config = from_mapping(MegaByteConfig, whole.config, "m")
    cuts = share(config, 2, 1).cuts(config, whole.weights, "m")
    foreign = dataclasses.replace(read_checkpoint(folder / "nvfp4"), layout="foreign")
    found = parts.part_of(foreign, lambda checkpoint: cuts)
    for path, cut in cuts.items():
        assert mx.array_equal(found.weights[path], whole.weights[path][cut])
