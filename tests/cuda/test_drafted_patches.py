"""A stream whose patches are drafted, in launches of several sequences: on a GPU where there is one, else in the emulator."""

from types import SimpleNamespace

import pytest
from cuda_emulator import compiler, emulate
from drafted_cases import Recording, drafted
from stream_cases import run
from test_stages import network_of

from marlin_cli.engine import cuda_patches, decoding
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.merged_streams import MergedStreams
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.schedulers import scheduler_of, streams_of
from marlin_cli.engine.scheduling import Request, SchedulerLimits
from marlin_cli.engine.speculation import Speculation
from marlin_cli.engine.stopping import Stopping
from marlin_cli.engine.stream_scheduler import StreamScheduler
from marlin_cli.errors import UsageError

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(compiler() is None, reason="no C++ compiler on Linux here")]
ALONE = SchedulerLimits(max_streams=1)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate(monkeypatch)
    monkeypatch.setattr(decoding, "fuse", lambda network: None)


def undrafted(network, request):
    """The bytes of a request whose stream could be drafted, and is not."""
    streams = streams_of(network, CacheBits())
    assert isinstance(streams, MergedStreams)
    scheduler = StreamScheduler(network, streams, ALONE, draft_source=lambda request, prompt: Recording())
    (found,) = run(scheduler, [Request(request.prompt, request.stopping, speculation=Speculation(1))])
    return found.data


@pytest.mark.parametrize(("length", "count", "wrong_every"), [
    (8, 24, 6),
    *(pytest.param(length, 58, wrong, marks=pytest.mark.slow) for length in (7, 8, 70) for wrong in (0, 1, 6)),
])  # fmt: skip
def test_drafts_change_nothing(length, count, wrong_every, monkeypatch):
    """Prompts that end within a patch and with one, and a text that ends with the context; a launch has some sequences."""
    monkeypatch.setattr(cuda_patches, "SEQUENCES", 2 if count < 58 else 4)
    network = network_of(format="mxfp8", **({"global_layers": 1, "local_layers": 1} if count < 58 else {}))
    request = Request(bytes(range(40, 40 + length)), Stopping(count))
    expected = undrafted(network, request)
    known = SimpleNamespace(data=expected)
    (found,), (told,) = drafted(network, [request], [known], wrong_every, limits=ALONE)
    assert found.data == expected and len(expected) == count
    assert told.drafted_bytes > 0
    if wrong_every == 0:
        assert told.accepted_bytes > 30 and told.passes < 8
    if wrong_every == 1:
        assert told.accepted_bytes < 4


@pytest.mark.slow
def test_others_go_on_without(monkeypatch):
    """Streams that are drawn at random, and such as are beside others, have no drafts and their bytes all the same."""
    monkeypatch.setattr(cuda_patches, "SEQUENCES", 4)
    network = network_of(format="mxfp8")
    requests = [Request(b"abcd", Stopping(12), Sampling(1.0, seed=1)), Request(b"abcd", Stopping(12), Sampling(1.0, seed=1))]
    expected = run(scheduler_of(network, SchedulerLimits(max_streams=2)), requests)
    known = [SimpleNamespace(data=each.data) for each in expected]
    found, told = drafted(network, requests, known, 0, limits=SchedulerLimits(max_streams=2))
    assert [each.data for each in found] == [each.data for each in expected]
    assert all(each.drafted_bytes == 0 and each.passes == 3 for each in told)


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        ("paper", "a patch of the layout paper begins"),
        ("megabyte_pytorch", "operation by operation here: the layout is megabyte"),
    ],
)
def test_what_is_not_drafted_says_why(layout, why):
    network = network_of(layout=layout)
    with pytest.raises(UsageError, match=why):
        scheduler_of(network).admit(Request(b"abcd", speculation=Speculation(2)))
