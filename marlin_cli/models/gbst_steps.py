"""What calibration, packing, rotation and tuning ask of a GBST; see `models.architecture`: a ByT5, but for the front end."""

import dataclasses

import mlx.core as mx

from marlin_cli.errors import QuantizationError
from marlin_cli.models import byt5_steps
from marlin_cli.models.architecture import Architecture, Piece, Rotation, State
from marlin_cli.models.gbst import Gbst, GbstConfig
from marlin_cli.models.pair_batch import PairBatch

FRONT = "front.proj"


def start(network: Gbst, batch: PairBatch) -> State:
    """The state of pairs before the front end."""
    return {**byt5_steps.start(network, batch), "source": batch.source}


def pieces(network: Gbst) -> list[Piece]:
    """The front end, then the pieces of a ByT5."""
    return [Piece(_run_front, (FRONT,)), *byt5_steps.pieces(network)]


def rotation(config: GbstConfig) -> Rotation:
    """None.

    Raises:
        QuantizationError: always.
    """
    raise QuantizationError("a GBST cannot be rotated: its front end reads the channels of the embedding one by one")


def _run_front(network: Gbst, state: State) -> State:
    lengths = state.get("lengths")
    after = {name: value for name, value in state.items() if name not in ("source", "lengths", "real")}
    after["rows"] = network.rows(state["source"], lengths)
    real = network.state_lengths(lengths)
    if real is not None:
        after |= {"lengths": real, "real": mx.arange(after["rows"].shape[1]) < real[:, None]}
    return after


GBST: Architecture = dataclasses.replace(
    byt5_steps.BYT5, name="gbst", title="GBST", config=GbstConfig, network=Gbst, start=start, pieces=pieces, rotation=rotation
)
