"""A network whose numbers are none says so: neither bytes nor scores come of it."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from byt5_cases import random_byt5

from marlin_cli.engine.answer_requests import AnswerLimits
from marlin_cli.engine.answer_scoring import bits_of_answers
from marlin_cli.engine.answering import answer, answer_with_beams
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.decoding import Lockstep
from marlin_cli.engine.generation import generate
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.scoring import bits_of
from marlin_cli.engine.stopping import Stopping
from marlin_cli.errors import CheckpointError
from marlin_cli.models.byt5_ids import ids_of_bytes
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig

MESSAGE = "the model: its predictions are not finite; its weights are damaged or overflow"
SAMPLINGS = [Sampling(), Sampling(temperature=0.8, top_p=0.9, top_k=40, min_p=0.01)]


def spoiled(network: MegaByte, part: str) -> MegaByte:
    """One number of a part is none."""
    layer = {"head": network.output, "local": network.local.layers[0].ffn.down_proj}.get(
        part, network.stages[0].stack.layers[0].attention.v_proj
    )
    layer.weight[3, 1] = mx.nan
    return network


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "drawn"])
@pytest.mark.parametrize("part", ["head", "local", "global"])
@pytest.mark.parametrize("prompts", [[b""], [b"ab", b"xyz012"]], ids=["alone", "batch"])
def test_nothing_is_generated(
    prompts: list[bytes], part: str, sampling: Sampling, each_config: MegaByteConfig, random_network: Callable[..., MegaByte]
) -> None:
    network = spoiled(random_network(each_config), part)
    with pytest.raises(CheckpointError, match=MESSAGE):
        list(generate(network, prompts, Stopping(max_bytes=40), sampling))
    if prompts != [b""]:
        with pytest.raises(CheckpointError, match=MESSAGE):
            bits_of(network, np.frombuffer(b"some bytes of two windows", dtype=np.uint8), 20)


@pytest.mark.parametrize("fused", [True, False])
def test_what_stops_being_a_number_on_the_way_ends_the_stream(
    fused: bool, random_network: Callable[..., MegaByte], small_sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first check finds nothing: the global stage overflows later, and zeros come of it."""
    if not fused:
        monkeypatch.setattr("marlin_cli.engine.decoding.fuse", lambda network: None)
    network = random_network(MegaByteConfig(**small_sizes))
    to_next, patches = MegaByte.to_next, iter(range(100))

    def overflowing(network: MegaByte, number: int, hidden: mx.array) -> mx.array:
        return to_next(network, number, hidden) * (mx.nan if next(patches) >= 3 else 1)

    monkeypatch.setattr(MegaByte, "to_next", overflowing)
    pieces = generate(network, [b"ab"], Stopping(max_bytes=60), Sampling())
    seen = b""
    with pytest.raises(CheckpointError, match=MESSAGE):
        for piece in pieces:
            seen += piece.data
    assert len(seen) <= 16


def test_a_check_changes_nothing(each_config: MegaByteConfig, random_network: Callable[..., MegaByte]) -> None:
    """Whenever it comes: before each step here, and never in the other run."""
    network = random_network(each_config)

    def bytes_of(check: Callable[[Lockstep], None]) -> list[tuple[int, bytes]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Lockstep, "check_finite", check)
            patch.setattr("marlin_cli.engine.decoding.fuse", lambda network: None)
            pieces = generate(network, [b"abcde", b"x"], Stopping(max_bytes=40), SAMPLINGS[1])
            return [(piece.stream, piece.data) for piece in pieces]

    plain = Lockstep.check_finite
    advance = Lockstep.advance
    unchecked = bytes_of(lambda state: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lockstep, "advance", lambda state, *rest: (plain(state), advance(state, *rest))[1])
        assert bytes_of(plain) == unchecked


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "drawn"])
def test_no_answer_is_given(sampling: Sampling) -> None:
    network = random_byt5()
    network.decoder.layers[1].ffn.down_proj.weight[0, 0] = mx.nan
    sources = [[*ids_of_bytes(b"an input"), 1]]
    with pytest.raises(CheckpointError, match=MESSAGE):
        list(answer(network, sources, AnswerLimits(8), sampling))
    with pytest.raises(CheckpointError, match=MESSAGE):
        answer_with_beams(network, sources, AnswerLimits(8), Beams(3))
    with pytest.raises(CheckpointError, match=MESSAGE):
        bits_of_answers(network, sources, [b"x"])
