"""Whole stages in one launch against the network's own layers: on a GPU where there is one, else in the emulator."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import packed_rows
import pytest
from cuda_emulator import OwnQueue, compiler, emulate
from mlx.utils import tree_map

from marlin_cli import api
from marlin_cli.commands import bench_output
from marlin_cli.engine import cache as engine_cache
from marlin_cli.engine import cuda_patches, decoding, whole_patches
from marlin_cli.engine.cuda_patches import global_stage, local_stage, patch_decoder
from marlin_cli.engine.decoding import CacheBits, Lockstep
from marlin_cli.engine.endless import Window
from marlin_cli.engine.generation import generate
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.engine.stage_caches import GraphCache
from marlin_cli.engine.stopping import Stopping
from marlin_cli.errors import BackendError, CheckpointError, UsageError
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cuda_stages
from marlin_cli.ops.cuda_stages import StageOnDevice, takes_stage
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(compiler() is None, reason="no C++ compiler on Linux here")]
SMALL = {
    "patch_size": 4, "max_bytes": 128, "byte_dim": 16,
    "global_layers": 2, "global_dim": 64, "global_heads": 4, "global_ffn_dim": 192,
    "local_layers": 2, "local_dim": 32, "local_heads": 2, "local_ffn_dim": 96,
}  # fmt: skip
PACKED = ("nvfp4", "mxfp4", "mxfp8", "int4", "int8")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate(monkeypatch)


def network_of(dtype=mx.float32, format=None, **options):
    mx.random.seed(0)
    network = MegaByte(MegaByteConfig(**{**SMALL, **options}))
    draw = lambda a: mx.random.normal(a.shape) * (0.3 if a.ndim == 1 else a.shape[-1] ** -0.5)  # noqa: E731
    network.update(tree_map(draw, network.parameters()))
    if format is not None:
        group = 32 if format.startswith("int") else None
        settings = QuantizationSettings(global_format=format, local_format=format, group_size=group)
        network = quantize_network(network, settings, method="rtn").network
    network.set_dtype(dtype)
    mx.eval(network.parameters())
    return network


def loaded(stage, streams, steps):
    """A stage that is ready to be launched, and the queue for that."""
    queue = cuda_patches.Queue()
    device = StageOnDevice(stage, streams, steps, queue)
    device.load(*cuda_patches.compiled([device.text]))
    return device, queue


def to_device(queue, array):
    """Memory with the numbers of an array of MLX, or nothing."""
    if array is None:
        return None
    data = np.array(array)
    memory = queue.allocate(data.nbytes)
    queue.write(memory.address, data.tobytes())
    return memory


def from_device(queue, memory, dtype):
    return np.frombuffer(queue.read(memory.address, memory.size), dtype)


def close(found, expected, tolerance):
    found, expected = np.array(found), np.array(expected)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def random_ids(*shape):
    return mx.array(np.random.default_rng(sum(shape)).integers(0, 256, shape).astype(np.int32))


VARIANTS = {
    "swiglu": {},
    "grouped": {"global_kv_heads": 2, "local_kv_heads": 1, "qk_norm": True},
    "layernorm": {"norm": "layernorm", "ffn": "gelu", "ffn_bias": True, "local_positions": "rope", "rope_interleaved": True},
    "variance": {"norm": "variance", "ffn": "relu", "attention_window": 2, "local_positions": "none", "local_heads": 1},
}


# Each kind of weights, each option of a layer, few and many streams. An emulated kernel takes seconds to compile: one always
# runs.
CASES = [
    ("grouped", "nvfp4", 3), ("swiglu", None, 1), ("swiglu", None, 9), ("layernorm", "int4", 1), ("variance", "mxfp8", 2),
    ("swiglu", "mxfp4", 16), ("grouped", "int8", 1),
]  # fmt: skip
EACH_CASE = pytest.mark.parametrize(
    ("variant", "format", "streams"),
    [pytest.param(*case, marks=[] if case == CASES[0] or mx.cuda.is_available() else pytest.mark.slow) for case in CASES],
)


@EACH_CASE
def test_a_global_step(variant, format, streams):
    """Three patches behind a cache that MLX began, some of it filler."""
    network = network_of(format=format, **VARIANTS[variant])
    stage = global_stage(network)
    assert takes_stage(stage, streams)
    padding = mx.array([row % 2 for row in range(streams)]) if streams > 1 else None
    filler = [] if padding is None else padding.tolist()
    caches = [GraphCache(network["global"], network.stages[0].config, False, filler, CacheBits()) for _ in range(2)]
    rows = mx.random.normal((streams, 2, stage.dim), key=mx.random.key(1))
    for cache in caches:
        mx.eval(cache.run(rows))
    device, queue = loaded(stage, streams, network.config.patch_size)
    filled = to_device(queue, padding)
    out = queue.allocate(streams * stage.last.rows * 4)
    for patch in range(3):
        ids = random_ids(streams, network.config.patch_size, patch + 1)[..., 0]
        hidden = caches[0].run(network.token_rows(0, ids[:, None], 0, None))[:, -1]
        expected = network.to_next(0, hidden)[:, 0]
        device.set_caches([layer.with_room() for layer in caches[1].layers])
        given = to_device(queue, ids)
        mx.synchronize()
        device.step(given.address, 2 + patch, 0 if filled is None else filled.address, out.address)
        close(from_device(queue, out, np.float32).reshape(expected.shape), expected, 3e-5)


@EACH_CASE
def test_a_local_patch(variant, format, streams):
    """The ids that the network's own logits call the likeliest, some of them given."""
    network = network_of(format=format, **VARIANTS[variant])
    stage, length = local_stage(network), network.config.patch_size
    assert takes_stage(stage, streams)
    device, queue = loaded(stage, streams, length)
    device.own_caches(length)
    lead = mx.random.normal((streams, stage.dim), key=mx.random.key(2))
    last = network.stages[-1]
    added = mx.zeros((1, length, stage.dim)) if last.positions is None else last.positions.weight[None]
    for known in (0, 2):
        given = random_ids(streams, known) if known else None
        held = [to_device(queue, array) for array in (lead, added, given)]
        places = [0 if each is None else each.address for each in held]
        out = queue.allocate(4 * streams * length)
        number = device.decode_sequence(*places, 0, (0.0, 1.0, 0.0, 0), known, length - known, out.address)
        ids = mx.array(device.mailbox.read(number, streams, length - known))
        there = from_device(queue, out, np.int32).reshape(streams, length)
        assert there[:, known:].tolist() == ids.tolist() and (given is None or there[:, :known].tolist() == given.tolist())
        whole = ids if given is None else mx.concatenate([given, ids], axis=1)
        rows = mx.concatenate([lead[:, None], last.byte_embedding(whole[:, :-1])], axis=1) + added
        logits = network.head(network.local(rows))
        best = mx.argmax(logits, axis=-1)[:, known:]
        assert ids.tolist() == best.tolist()


@pytest.mark.parametrize("looks", [0, 50_000])
@pytest.mark.parametrize(
    ("variant", "format", "streams"),
    [
        ("grouped", "nvfp4", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("swiglu", None, 2), ("grouped", "mxfp8", 9))),
    ],
)
def test_sixteen_bits(variant, format, streams, looks, monkeypatch):
    """Rows that are copied as they stand in memory, or looked at; what rounds at other places is near."""
    monkeypatch.setattr(cuda_stages, "MOST_LOOKS", looks)
    monkeypatch.setattr(cuda_stages, "MOST_BROUGHT", looks)
    monkeypatch.setattr(cuda_stages, "NARROW", 0)
    network = network_of(format=format, dtype=mx.bfloat16, **VARIANTS[variant])
    stage, length = global_stage(network), network.config.patch_size
    assert takes_stage(stage, streams) and cuda_stages.is_copied(stage, streams) == (looks == 0)
    cache = GraphCache(network["global"], network.stages[0].config, False, [], CacheBits())
    device, queue = loaded(stage, streams, length)
    out = queue.allocate(streams * stage.last.rows * 2)
    caches = [
        [mx.zeros((streams, stage.kv_heads, 8, stage.head_dim), dtype=mx.bfloat16) for _ in range(2)] for _ in stage.layers
    ]
    for patch in range(2):
        ids = random_ids(streams, length, patch + 1)[..., 0]
        expected = network.to_next(0, cache.run(network.token_rows(0, ids[:, None], 0, None))[:, -1])[:, 0]
        device.set_caches(caches)
        given = to_device(queue, ids)
        mx.synchronize()
        device.step(given.address, patch, 0, out.address)
        found = from_device(queue, out, np.uint16).astype(np.uint32) << 16
        close(found.view(np.float32).reshape(expected.shape), expected.astype(mx.float32), 4e-2)
    stage = local_stage(network)
    device, queue = loaded(stage, streams, length)
    device.own_caches(length)
    lead = mx.random.normal((streams, stage.dim), key=mx.random.key(2)).astype(mx.bfloat16)
    added = mx.zeros((length, stage.dim), dtype=mx.bfloat16)
    held = [to_device(queue, array.view(mx.uint16)) for array in (lead, added)]
    out = queue.allocate(4 * streams * length)
    number = device.decode_sequence(*(each.address for each in held), 0, 0, (0.0, 1.0, 0.0, 0), 0, length, out.address)
    ids = mx.array(device.mailbox.read(number, streams, length))
    rows = mx.concatenate([lead[:, None], network.stages[-1].byte_embedding(ids[:, :-1])], axis=1)
    logits = network.head(network.local(rows)).astype(mx.float32)
    behind = mx.max(logits, axis=-1) - mx.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    assert behind.max().item() <= 4e-2 * mx.abs(logits).max().item()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.3, top_k=50, top_p=0.8, min_p=0.02),
        pytest.param(Sampling(1.0), marks=pytest.mark.slow),
        pytest.param(Sampling(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ids_are_drawn_as_today(sampling, monkeypatch):
    """Generation with whole patches in one launch and without: prompts that end inside a patch, and a stream that stops."""
    network = network_of(format="mxfp8")
    prompts = [b"abcdefgh", b"abcd", b"", b"abcdefghi"]
    monkeypatch.setattr(decoding, "fuse", lambda network: None)

    def generated(*stop):
        streams = [b""] * len(prompts)
        for piece in generate(network, prompts, Stopping(max_bytes=19, stop=stop), sampling):
            streams[piece.stream] += piece.data
        return streams

    whole = generated()
    stop = whole[0][6:8]
    stopped = generated(stop)
    monkeypatch.setattr(decoding, "patch_decoder", lambda *_: None)
    assert generated() == whole and {len(stream) for stream in whole} == {19}
    assert generated(stop) == stopped and len(stopped[0]) < 19


@pytest.mark.slow
def test_time_by_part(monkeypatch):
    """Launches that keep account of their time give the same ids, and all of it goes to some part."""
    monkeypatch.setattr(decoding, "fuse", lambda network: None)
    network = network_of(format="nvfp4")
    plain, timed = (
        Lockstep(network, [bytes(range(65, 81))], decoder=patch_decoder(network, 1, timed=each)) for each in (False, True)
    )
    assert plain.part_seconds is None
    ids = [[state.advance(Sampling(), Noise(0, 256), 8).tolist() for _ in range(2)] for state in (plain, timed)]
    assert ids[0] == ids[1]
    parts = timed.part_seconds
    assert list(parts) == ["global", "global cache", "local", "local cache", "head", "sampling"]
    assert all(0 < seconds < 60 for seconds in parts.values())


@pytest.mark.slow
def test_groups_of_streams(monkeypatch):
    """More streams than one launch takes: prompts that end inside a patch, and streams that stop."""
    monkeypatch.setattr(cuda_patches, "MOST_STREAMS", 2)
    monkeypatch.setattr(decoding, "fuse", lambda network: None)
    network = network_of(format="mxfp8")
    prompts = [b"abcdefgh", b"abcd", b"abcdefghij", b"a", b"abcdefgg"]
    outcomes = []
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(decoding, "patch_decoder", lambda *_: None)
        streams = [b""] * len(prompts)
        for piece in generate(network, prompts, Stopping(max_bytes=13), Sampling(0.9, top_k=50)):
            streams[piece.stream] += piece.data
        outcomes.append(streams)
    assert outcomes[0] == outcomes[1] and {len(stream) for stream in outcomes[0]} == {13}


def test_what_was_queued_too_far_is_taken_back(monkeypatch):
    """Logits, and ids pushed, between whole patches of three streams and a filler; the noise is that of the steps asked for."""
    network, sampling = network_of(format="mxfp8"), Sampling(1.3, top_k=50, top_p=0.8, min_p=0.02)
    monkeypatch.setattr(decoding, "fuse", lambda network: None)
    found = []
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(decoding, "patch_decoder", lambda *_: None)
        state, noise = Lockstep(network, [b"abcd", b"abcdefgh", b"wxyz"]), Noise(0, 256)
        ids, logits = [], []
        for pushed in range(2):
            for _ in range(1 if whole else 4):
                ids += np.array(state.advance(sampling, noise, 64)).T.tolist()
            logits.append(np.array(state.logits))
            for byte in b"wxyz"[: 4 - 2 * pushed]:
                state.push(mx.array([byte] * 3))
        found.append((ids, np.stack(logits), state.positions, state.cache_bytes["global"]))
    (ids, logits, *rest), (expected_ids, expected_logits, *expected_rest) = found
    assert ids == expected_ids and rest == expected_rest
    assert np.abs(logits - expected_logits).max() < 1e-4


# Where a block stays away: of a launch that draws ids, and of a global step, which leaves none for the host.
BEGINNINGS = {"local": "int32_t* mail = mail_of(stage, number);", "global": "machine.heed(exchange, turn);"}


@pytest.mark.skipif(mx.cuda.is_available(), reason="it plants a fault in the emulator")
@pytest.mark.parametrize("stage", ["global", pytest.param("local", marks=pytest.mark.slow)])
def test_a_block_that_does_not_come_is_an_error(stage, monkeypatch):
    """The others give up waiting for it, and the host is told after the patch."""
    begin = BEGINNINGS[stage]

    def edit(text):
        return text.replace("2000000000ull", "20000000ull").replace(begin, f"{begin} if (blockIdx.x == 2) return;")

    monkeypatch.setattr(OwnQueue, "edit", staticmethod(edit))
    monkeypatch.setattr(decoding, "fuse", lambda network: None)
    with pytest.raises(BackendError, match="blocks did not all run at once"):
        list(generate(network_of(), [b"abcd"], Stopping(max_bytes=8), Sampling()))


def test_what_is_no_number_is_an_error(monkeypatch):
    """Logits never leave the GPU, so the kernels look at them."""
    monkeypatch.setattr(decoding, "fuse", lambda network: None)
    network = network_of()
    weight = network.output.weight
    network.output.weight = mx.where(mx.arange(weight.shape[0])[:, None] == 200, mx.nan, weight)
    with pytest.raises(CheckpointError, match="not finite"):
        list(generate(network, [b"abcd"], Stopping(max_bytes=8), Sampling()))


@pytest.mark.slow
def test_the_order_of_threads_does_not_matter(monkeypatch):
    network = network_of(format="nvfp4")
    monkeypatch.setattr(decoding, "fuse", lambda network: None)
    outputs = []
    for backwards in (False, True):
        if not mx.cuda.is_available():
            monkeypatch.setattr(OwnQueue, "backwards", backwards)
        outputs.append([piece.data for piece in generate(network, [b"abcd", b"efgh"], Stopping(max_bytes=16), Sampling())])
    assert outputs[0] == outputs[1]


def test_what_is_left_to_operations(monkeypatch):
    taken = network_of()
    assert patch_decoder(taken, 64) is not None and patch_decoder(taken, 65) is None
    for options in (
        {"layout": "megabyte_pytorch", "local_positions": "none"},
        {"token_shift": True},
        {"global_head_dim": 24},
        {"global_dim": 60, "global_heads": 2, "global_head_dim": 16},
    ):
        assert patch_decoder(network_of(**options), 1) is None, options
    assert patch_decoder(network_of(dtype=mx.float16), 1) is None
    for bits in (CacheBits(window=Window()), CacheBits(share_left=0.1)):
        assert patch_decoder(taken, 1, bits) is None
    mixed = QuantizationSettings(global_format="nvfp4", overrides={r"global\.layers\.1\..*v_proj": "mxfp8"})
    assert patch_decoder(quantize_network(taken, mixed, method="rtn").network, 1) is None
    monkeypatch.setattr(cuda_stages, "shared_memory", lambda: 8_000)
    assert patch_decoder(taken, 1) is None
    monkeypatch.setattr(cuda_stages, "shared_memory", lambda: 1 << 17)
    assert patch_decoder(taken, 1) is not None
    assert whole_patches.patch_decoder(taken, 1) is not None
    monkeypatch.setenv("MARLIN_PATCHES", "operations")
    assert whole_patches.patch_decoder(taken, 1) is None
    monkeypatch.setenv("MARLIN_PATCHES", "steps")
    with pytest.raises(UsageError, match="MARLIN_PATCHES"):
        whole_patches.patch_decoder(taken, 1)


@pytest.mark.parametrize(
    ("options", "bits", "said"),
    [
        ({}, (8, 4), "the kernels know every part"),
        ({"layout": "paper"}, (16, 16), "the kernels know every part"),
        ({"token_shift": True}, (8, 8), "a token shift"),
    ],
)
def test_bench_says_which_path_decodes(options, bits, said, monkeypatch):
    loaded = SimpleNamespace(network=network_of(**options), cache_bits=CacheBits(*bits))
    tables = []
    monkeypatch.setattr(api, "load", lambda model, device, options, kv_bits: loaded if kv_bits == bits else None)
    monkeypatch.setattr(bench_output.console, "table", lambda *arguments, **options: tables.append(arguments))
    bench_output._show_whole(["a model"], {}, bits)
    ((_, _, rows),) = tables
    assert [row[3] for row in rows] == [said] * 3


def test_no_block_has_logits_alone(monkeypatch):
    """It would be waited for by nobody, and might look for logits that have been written over."""
    monkeypatch.setattr(cuda_stages, "multiprocessors", lambda: 132)
    stage = local_stage(network_of())
    assert cuda_stages.blocks_of(stage) == 12 and stage.last.rows == 256  # of 3 x 32 rows of q, k and v, and 96 of gate


LAYOUTS = {
    "paper": {"layout": "paper", "global_positions": "learned", "ffn": "relu", "norm": "layernorm"},
    "paper without pads": {"layout": "paper", "global_positions": "learned+rope", "start_tokens": False},
    "prefix, learned": {"global_positions": "learned"},
}


@pytest.mark.parametrize(
    ("layout", "format", "bits", "sampling"),
    [
        ("paper without pads", "mxfp8", CacheBits(), Sampling(0.9, top_k=50)),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (
            ("paper", None, CacheBits(), Sampling()), ("paper", "nvfp4", CacheBits(16, 4), Sampling(1.0)),
            ("prefix, learned", None, CacheBits(), Sampling()), ("paper", "int8", CacheBits(), Sampling(1.0)),
        )),
    ],
)  # fmt: skip
def test_layouts(layout, format, bits, sampling, monkeypatch):
    """Bytes of whole patches are those of operations: conditions by byte, the id before a patch, positions of patches."""
    if not mx.cuda.is_available():
        monkeypatch.setattr(engine_cache, "pack_rows", packed_rows.pack_rows)
    monkeypatch.setattr(decoding, "fuse", lambda network: None)
    wide = {"byte_dim": 32, "global_dim": 128} if format else {}
    network = network_of(format=format, **LAYOUTS[layout], **wide)
    assert patch_decoder(network, 3, bits) is not None
    prompts = [b"abcdefgh", b"abcd", b"", b"abcdefghi", b"bcdefghijk"]
    found = []
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(decoding, "patch_decoder", lambda *_: None)
        streams = [b""] * len(prompts)
        for piece in generate(network, prompts, Stopping(max_bytes=15), sampling, bits):
            streams[piece.stream] += piece.data
        found.append(streams)
    assert found[0] == found[1] and {len(stream) for stream in found[0]} == {15}
