"""`marlin generate --follow`: a pipe that is read as it comes, and what may follow it, whenever it pauses.

What is written is a guess and no part of what is followed: the next one is of what has really come. More input ends it.
"""

import base64
import json
import sys
from typing import Any

from marlin_cli.api import decode
from marlin_cli.bench.surprise import default_window
from marlin_cli.commands.pipes import BLOCK_BYTES, PipeSource, stdin_descriptor
from marlin_cli.commands.writers import TerminalView, is_viewed
from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.stopping import Stopping

# Nothing has come for so long: the input pauses.
PAUSE_SECONDS = 0.5


class FollowedPipe(PipeSource):
    """Stdin, of which no more than the last bytes are kept.

    Args:
        view_bytes: how many.
    """

    def __init__(self, view_bytes: int) -> None:
        super().__init__(stdin_descriptor(), PAUSE_SECONDS)
        self._most = view_bytes
        self.view = b""
        self.seen = 0

    def read_on(self) -> bool:
        """Read until the input pauses or ends; whether it goes on."""
        while part := self.read(BLOCK_BYTES):
            self.seen += len(part)
            self.view = (self.view + part)[-self._most :]
        return part is None


def follow(
    model: ContinuingModel, stopping: Stopping, sampling: Sampling, *, sentinels: bool, raw: bool, as_json: bool
) -> None:
    """Write what may follow stdin whenever it pauses, until it ends: bytes with a line feed behind them, or a line of JSON.

    Raises:
        MarlinError: the input cannot be read, or the model gives no numbers.
    """
    window = model.cache_bits.window or default_window(model.config)
    pipe = FollowedPipe(window.bytes or (model.config.max_bytes + 1) // 2)
    model = model.cached(window, model.cache_bits.share_left)
    told = 0
    goes_on = True
    while goes_on:
        goes_on = pipe.read_on()
        if pipe.seen == told and (goes_on or told):
            continue
        told, data, reason = pipe.seen, b"", None
        view = TerminalView() if is_viewed(raw=raw) else None
        for piece in model.pieces([pipe.view], stopping, sampling, sentinels=sentinels):
            data, reason = data + piece.data, piece.stop_reason
            if not as_json:
                _write(piece.data if view is None else view.push(piece.data))
            if reason is None and goes_on and pipe.has_more:
                reason = "input"
                break
        if as_json:
            _write((json.dumps(_as_mapping(told, data, reason)) + "\n").encode("ascii"))
        else:
            _write((b"" if view is None else view.flush()) + (b"" if data.endswith(b"\n") else b"\n"))


def _as_mapping(seen: int, data: bytes, reason: str | None) -> dict[str, Any]:
    return {
        "read_bytes": seen,
        "generated_bytes": len(data),
        "bytes_base64": base64.b64encode(data).decode("ascii"),
        "text": decode(data),
        "stop_reason": reason,  # input: more came
    }


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
