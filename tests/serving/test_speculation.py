"""A server that drafts streams ahead: the same bytes, and what came of it in usage, requests and metrics."""

import json

import mlx.core as mx
import pytest
from byt5_cases import random_byt5
from mlx.utils import tree_map
from serving_cases import parrot, running

from marlin_cli.answering_model import AnsweringModel
from marlin_cli.api import MegaByteModel
from marlin_cli.engine.endless import Window
from marlin_cli.engine.scheduling import SchedulerLimits
from marlin_cli.engine.speculation import AUTO, Speculation
from marlin_cli.errors import UsageError
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cpu
from marlin_cli.ops.device import choose_device
from marlin_cli.serving.loading import served_model, viewed

MODULE = cpu.kernels()[0]
SHAPE = {"patch_size": 4, "max_bytes": 512, "global_layers": 1, "global_dim": 32, "global_heads": 1, "global_ffn_dim": 64}
LOCAL = {"local_layers": 1, "local_dim": 32, "local_heads": 1, "local_ffn_dim": 64}
ASKED = {"prompt": "a prompt", "max_tokens": 40, "temperature": 1.0, "seed": 3, "return_token_ids": True}


@pytest.fixture(scope="module")
def model():
    mx.random.seed(3)
    network = MegaByte(MegaByteConfig(**SHAPE, **LOCAL))
    network.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.3, network.parameters()))
    mx.eval(network.parameters())  # for the thread that serves it
    return MegaByteModel(network, choose_device("cpu"))


@pytest.fixture
def exact_rows():
    if MODULE is None:
        pytest.skip(f"no CPU kernels here: {cpu.kernels()[1]}")
    MODULE.set_exact_rows(True)
    yield
    MODULE.set_exact_rows(cpu.rows_are_exact())


def served(model, speculation):
    return running(lambda: served_model(model, "megabyte-demo", "tiny", SchedulerLimits(2), None, speculation))


def test_a_prediction_is_a_draft_and_no_byte_changes(model, exact_rows):
    with served(model, None) as server:
        plain = server.ask("/v1/completions", ASKED)[1]
    expected = plain["choices"][0]["token_ids"]
    assert "completion_tokens_details" not in plain["usage"]
    with served(model, AUTO) as server:
        for content in ({"base64": None}, expected, expected[:10] + [0] + expected[11:]):
            asked = ASKED if isinstance(content, dict) else {**ASKED, "prediction": {"type": "content", "content": content}}
            status, document = server.ask("/v1/completions", asked)
            assert (status, document["choices"][0]["token_ids"]) == (200, expected)
            details = document["usage"]["completion_tokens_details"]
            assert details["passes"] <= 11
            if content is expected:
                assert details["accepted_prediction_tokens"] > 30 and details["rejected_prediction_tokens"] == 0
                assert details["passes"] < 8
        query = f"/v1/bytes?max_bytes=40&temperature=1&seed=3&prediction_hex={bytes(expected).hex()}"
        _, headers, body = server.call("POST", query, b"a prompt")
        assert list(body) == expected
        [stream] = json.loads(server.call("GET", headers["Content-Location"])[2])["streams"]
        assert stream["accepted_bytes"] > 20 and stream["passes"] < 8
        assert b"marlin_spec_decode_num_accepted_tokens_total" in server.call("GET", "/metrics")[2]


@pytest.mark.parametrize("prediction", [
    "text", {"content": "text"}, {"type": "other", "content": "text"}, {"type": "content"}, {"type": "content", "content": 3},
    {"type": "content", "content": [{"type": "image"}]}, {"type": "content", "content": "text", "more": 1},
    {"type": "content", "content": "x" * 513},
])  # fmt: skip
def test_a_prediction_that_cannot_be_is_refused(model, prediction):
    with served(model, AUTO) as server:
        status, document = server.ask("/v1/completions", {**ASKED, "prediction": prediction})
        assert status == 400 and document["error"]["message"].startswith("prediction:")


def test_a_prediction_may_be_parts_of_text(model):
    parts = [{"type": "text", "text": "some "}, {"type": "text", "text": "text"}]
    with served(model, AUTO) as server:
        assert server.ask("/v1/completions", {**ASKED, "prediction": {"type": "content", "content": parts}})[0] == 200
        assert server.call("POST", "/v1/bytes?prediction=a&prediction_hex=61", b"")[0] == 400
        assert server.call("POST", "/v1/bytes?prediction_hex=6", b"")[0] == 400


def test_a_server_that_verifies_nothing_says_so(model):
    made, schedulers, _ = parrot()
    with running(lambda: (made, schedulers)) as server:
        status, document = server.ask("/v1/completions", {"prediction": {"type": "content", "content": "text"}})
        assert status == 400 and "--speculate off" in document["error"]["message"]
    if MODULE is not None:
        MODULE.set_exact_rows(False)
        with pytest.raises(UsageError, match="MARLIN_ROWS=exact"):
            served_model(model, "megabyte-demo", "tiny", SchedulerLimits(2), None, Speculation(4))
        MODULE.set_exact_rows(cpu.rows_are_exact())


@pytest.mark.parametrize("window", [Window(128), Window()], ids=["window", "restart"])
def test_streams_without_an_end_are_drafted_too(model, window, exact_rows):
    asked = {**ASKED, "max_tokens": 800, "temperature": 0}
    found = {}
    for name, speculation in (("off", None), ("on", AUTO)):
        own = viewed(model, window)
        with running(
            lambda own=own, how=speculation: served_model(own, "megabyte-demo", "tiny", SchedulerLimits(2), None, how)
        ) as server:
            status, document = server.ask("/v1/completions", asked)
            assert (status, document["usage"]["completion_tokens"]) == (200, 800)
            found[name] = document["choices"][0]["token_ids"]
            status, document = server.ask("/v1/completions", {**asked, "max_tokens": 1 << 25})
            assert status == 400 and "take a stream" in document["error"]["message"]
    assert found["on"] == found["off"]


def test_a_model_that_answers_has_no_window():
    with pytest.raises(UsageError, match="--window: is of models that continue bytes"):
        viewed(AnsweringModel(random_byt5(), choose_device("cpu")), Window())
