"""Prompts that a server keeps: the same bytes as read anew, from memory and over a restart."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from serving_cases import running

from marlin_cli.answering_model import AnsweringModel
from marlin_cli.api import MegaByteModel
from marlin_cli.engine.scheduling import SchedulerLimits
from marlin_cli.errors import UsageError
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops.device import choose_device
from marlin_cli.serving.loading import KeptPrompts, served_model

PROMPT = bytes(range(32, 127)) * 4
SHAPE = {"patch_size": 4, "max_bytes": 512, "global_layers": 1, "global_dim": 32, "global_heads": 1, "global_ffn_dim": 64}
LOCAL = {"local_layers": 1, "local_dim": 32, "local_heads": 1, "local_ffn_dim": 64}


def model():
    mx.random.seed(3)
    network = MegaByte(MegaByteConfig(**SHAPE, **LOCAL))
    network.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.3, network.parameters()))
    mx.eval(network.parameters())  # for the thread that serves it
    return MegaByteModel(network, choose_device("cpu"))


def answers(store, *prompts):
    """What a server with a store says to prompts one after the other."""
    own = model()
    with running(lambda: served_model(own, "megabyte-demo", "tiny", SchedulerLimits(2), store)) as server:
        return [server.call("POST", "/v1/bytes?max_bytes=24", prompt)[2] for prompt in prompts]


def test_what_begins_alike_is_the_same_from_memory_and_from_files(tmp_path):
    longer = PROMPT + b" and more"
    anew = answers(None, PROMPT, longer)
    store = KeptPrompts(1 << 20, tmp_path / "states").store_for(model())
    assert answers(store, PROMPT, longer) == anew and store.memory_bytes > 0
    store.close()
    files = sorted((tmp_path / "states").glob("*.safetensors"))
    assert files
    again = KeptPrompts(0, tmp_path / "states").store_for(model())
    restored = []
    restore = again.restore
    again.restore = lambda ids: restored.append(restore(ids)) or restored[-1]
    assert answers(again, longer) == anew[1:]
    assert restored[0].units >= len(PROMPT) // 4
    again.close()


def test_usage_tells_how_much_of_a_prompt_was_known():
    own = model()
    store = KeptPrompts(1 << 20).store_for(own)
    with running(lambda: served_model(own, "megabyte-demo", "tiny", SchedulerLimits(2), store)) as server:
        asked = {"prompt": list(PROMPT), "max_tokens": 5}
        told = [server.ask("/v1/completions", {**asked, "n": n})[1] for n in (1, 1, 3)]
        _, _, events = server.call(
            "POST", "/v1/completions", {**asked, "stream": True, "stream_options": {"include_usage": True}}
        )
        order = server.call("GET", f"/v1/requests/{told[1]['id']}")[2]
    known = len(PROMPT) - 4  # what follows it is kept too, so that its last patch is read again
    assert [each["usage"]["prompt_tokens_details"] for each in told] == [{"cached_tokens": n} for n in (0, known, known)]
    assert f'"prompt_tokens_details":{{"cached_tokens":{known}}}'.encode() in events
    assert json.loads(order)["streams"][0]["cached_bytes"] == known
    store.close()


def test_nothing_is_kept_where_none_is_wanted_or_can_be():
    network = ByT5(ByT5Config(d_model=32, ffn_dim=64, heads=1, head_dim=32, encoder_layers=1, decoder_layers=1, max_bytes=96))
    assert KeptPrompts(0).store_for(model()) is None
    assert KeptPrompts().store_for(AnsweringModel(network, choose_device("cpu"))) is None


def test_a_model_that_cannot_says_so_if_it_is_asked(monkeypatch):
    def cannot(*_):
        raise UsageError("remembers otherwise")

    own = model()
    monkeypatch.setattr(type(own), "prompt_store", cannot)
    assert KeptPrompts().store_for(own) is None
    with pytest.raises(UsageError, match="otherwise"):
        KeptPrompts(is_asked_for=True).store_for(own)
