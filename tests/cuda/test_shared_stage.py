"""A global stage that ranks share, in one launch on each: two grids at once in the emulator, over one memory."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import OwnMemory, OwnQueue, compiler, emulate, own_code, own_memory
from mlx.utils import tree_map

from marlin_cli.api import MegaByteModel
from marlin_cli.engine import decoding
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.cuda_patches import added_rows, global_stage, local_stage
from marlin_cli.engine.cuda_shared import SharedByOperations
from marlin_cli.engine.generation import generate
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.stage_caches import GraphCache
from marlin_cli.engine.stopping import Stopping
from marlin_cli.errors import BackendError
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops.cuda_exchange import MOST_PLACES, Exchange
from marlin_cli.ops.cuda_stages import StageOnDevice, takes_stage
from marlin_cli.quantization.plan import QuantizationSettings

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler on Linux here"),
    pytest.mark.skipif(mx.cuda.is_available(), reason="both ranks run in one process, in the emulator"),
]
SIZES = {
    "patch_size": 4, "max_bytes": 128, "byte_dim": 16, "global_layers": 3, "global_dim": 64, "global_heads": 4,
    "global_ffn_dim": 128,
    "local_layers": 1, "local_dim": 32, "local_heads": 2, "local_ffn_dim": 64,
}  # fmt: skip
SUM = "one = parts.sum(grid, row * DIM + column, one);"  # of few_rows_stage.cuh


class One:
    """Of `size` ranks, without the others."""

    def __init__(self, rank, size):
        self.rank, self.size, self.group = rank, size, None


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate(monkeypatch)


def written(folder, format=None, **options):
    model = MegaByteModel.from_config(MegaByteConfig(**{**SIZES, **options}), device="cpu")
    mx.random.seed(0)
    draw = lambda a: mx.random.normal(a.shape) * (0.3 if a.ndim == 1 else a.shape[-1] ** -0.5)  # noqa: E731
    model.network.update(tree_map(draw, model.network.parameters()))
    if format is not None:
        model = model.quantize(settings=QuantizationSettings(global_format=format, local_format="16bit"))
    model.save(folder / "model")
    return folder / "model"


class Rank:
    """One rank's stage, ready to be launched."""

    def __init__(self, path, exchange, streams, rank, size, rows):
        network = MegaByteModel.from_pretrained(path, device="cpu", split=One(rank, size)).network
        stage = global_stage(network)
        assert stage.ranks == size and takes_stage(stage, streams)
        self.exchange, self.queue = exchange, exchange.queue
        self.device = StageOnDevice(stage, streams, network.config.patch_size, self.queue, exchange=exchange)
        self.device.load(*own_code([self.device.text]))
        shape = (streams, stage.kv_heads, rows, stage.head_dim)
        self.caches = [(mx.zeros(shape), mx.zeros(shape)) for _ in stage.layers]
        self.device.set_caches(self.caches)
        self.out = self.queue.allocate(streams * stage.last.rows * 4)

    def step(self, ids, seen):
        data = np.array(ids)
        given = self.queue.allocate(data.nbytes)
        self.queue.write(given.address, data.tobytes())
        self.device.step(given.address, seen, 0, self.out.address)

    @property
    def found(self):
        return np.frombuffer(self.queue.read(self.out.address, self.out.size), np.float32).reshape(self.device.streams, -1)


def together(path, streams, size=2, rows=8):
    memories = [OwnMemory(8 * 2 * size * MOST_PLACES) for _ in range(size)]
    places = [memory.address for memory in memories]
    exchanges = [Exchange(rank, OwnQueue(), memories[rank], places, own_memory(4)) for rank in range(size)]
    return [Rank(path, exchange, streams, rank, size, rows) for rank, exchange in enumerate(exchanges)]


def stepped(ranks, ids, seen, only=None):
    """What each rank's kernel gave, all at once."""
    threads = [threading.Thread(target=rank.step, args=(ids, seen)) for rank in (ranks if only is None else ranks[:only])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [rank.found for rank in ranks]


def expected(path, all_ids):
    """The conditions after each patch, by one process."""
    network = MegaByteModel.from_pretrained(path, device="cpu").network
    cache = GraphCache(network.stages[0].stack, network.stages[0].config, False, [], CacheBits())
    found = []
    for ids in all_ids:
        hidden = cache.run(network.token_rows(0, ids[:, None], 0, None))[:, -1]
        found.append(np.array(network.to_next(0, hidden)[:, 0]))
    return found


def ids_of(streams, count):
    draw = np.random.default_rng(streams)
    return [mx.array(draw.integers(0, 256, (streams, SIZES["patch_size"])).astype(np.int32)) for _ in range(count)]


def check(path, ranks, streams, patches=3):
    all_ids = ids_of(streams, patches)
    for seen, (ids, whole) in enumerate(zip(all_ids, expected(path, all_ids), strict=True)):
        found = stepped(ranks, ids, seen)
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])  # the same bits
        assert np.isfinite(found[0]).all()
        assert np.abs(found[0] - whole).max() <= 3e-5 * np.abs(whole).max()
    for rank in ranks:
        rank.exchange.check()


# Four groups of 32 in a row of o_proj.
WIDER = {"global_dim": 128, "global_heads": 8, "global_kv_heads": 2, "global_ffn_dim": 256}
CASES = [(2, "nvfp4", 1, {}), (2, None, 9, {"global_kv_heads": 2, "qk_norm": True}), (4, "mxfp8", 2, WIDER),
         (2, None, 3, {"norm": "layernorm", "ffn": "gelu", "ffn_bias": True})]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "format", "streams", "options"),
    [pytest.param(*case, marks=[] if case == CASES[0] else pytest.mark.slow) for case in CASES],
)
def test_ranks_make_of_a_patch_what_one_process_makes(size, format, streams, options, tmp_path):
    path = written(tmp_path, format, **options)
    check(path, together(path, streams, size), streams)


@pytest.mark.slow
@pytest.mark.parametrize("backwards", [False, True])
def test_the_order_of_threads_and_of_ranks_does_not_matter(backwards, tmp_path, monkeypatch):
    """A rank that is always late with looking, in whatever order."""
    path = written(tmp_path)
    monkeypatch.setattr(OwnQueue, "backwards", backwards)
    plant(monkeypatch, late(int(backwards)))
    check(path, together(path, 2), 2)


def plant(monkeypatch, sum_text=SUM, patience="60000000000ull", more=str):
    """Another text for the sum of an output."""
    text = lambda code: more("#include <unistd.h>\n" + code.replace("2000000000ull", patience).replace(SUM, sum_text))  # noqa: E731
    monkeypatch.setattr(OwnQueue, "edit", staticmethod(text))


def late(rank, microseconds=300_000):
    """A rank that looks long after all of its parts have gone, once a launch: by the last thread with a part."""
    here = f"blockIdx.x == 2 && threadIdx.x == 39 && parts.own() == {rank}"
    return f"{{ static thread_local bool slept = false; if (!slept && {here}) slept = true, usleep({microseconds}); {SUM} }}"


FAULTS = {
    "a part is not awaited": lambda code: code.replace("unsigned(cell >> 32) != turn_ &&", "false &&"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault, tmp_path, monkeypatch):
    path = written(tmp_path)
    edited = []

    def more(code):
        edited.append(FAULTS[fault](code) != code)
        return FAULTS[fault](code)

    plant(monkeypatch, late(1, 1_500_000), "500000000ull", more)
    with pytest.raises((AssertionError, BackendError)):
        check(path, together(path, 1), 1)
    assert all(edited)


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_an_error(tmp_path, monkeypatch):
    path = written(tmp_path)
    plant(monkeypatch, patience="2000000ull")
    ranks = together(path, 1)
    stepped(ranks, ids_of(1, 1)[0], 0, only=1)
    with pytest.raises(BackendError, match="another rank did not come"):
        ranks[0].exchange.check()
    ranks[1].exchange.check()


@pytest.mark.slow
def test_kernels_wait_no_longer_when_the_job_is_over(tmp_path, monkeypatch):
    path = written(tmp_path)
    ranks = together(path, 1)
    ranks[0].exchange.end()
    stepped(ranks, ids_of(1, 1)[0], 0, only=1)
    with pytest.raises(BackendError):
        ranks[0].exchange.check()


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(1.3, top_k=50), Sampling()], ids=str)
def test_where_gpus_have_no_exchange_the_local_stage_is_one_launch_still(sampling, tmp_path, monkeypatch):
    """Prompts that end inside a patch, a stream that stops, and one process in place of ranks."""
    network = MegaByteModel.from_pretrained(written(tmp_path), device="cpu").network
    prompts = [b"abcdefgh", b"abcd", b"", b"abcdefghi"]
    monkeypatch.setattr(decoding, "fuse", lambda network: None)

    def generated(*stop):
        streams = [b""] * len(prompts)
        for piece in generate(network, prompts, Stopping(max_bytes=19, stop=stop), sampling):
            streams[piece.stream] += piece.data
        return streams

    monkeypatch.setattr(decoding, "patch_decoder", lambda *_: None)
    expected = generated()
    stop = expected[0][6:8]
    stopped = generated(stop)
    made = lambda network, streams, *_: SharedByOperations(network, local_stage(network), added_rows(network), streams)  # noqa: E731
    monkeypatch.setattr(decoding, "patch_decoder", made)
    assert generated() == expected and {len(stream) for stream in expected} == {19}
    assert generated(stop) == stopped and len(stopped[0]) < 19
