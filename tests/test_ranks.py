"""Two real processes on loopback: they give what one gives, and when one is gone the other says so and keeps its work."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ring import ended, start_ring

from marlin_cli.errors import CorpusError, DistributedError, MarlinError, UsageError
from marlin_cli.ranks import ALONE, Launch, Ranks, is_follower, job, joined, launch, launch_of
from marlin_cli.ranks.watch import Connection, Watch

# What takes seconds to import is imported where it is used: most ranks here do without.


def network() -> Any:
    """The same one in every process."""
    import mlx.core as mx
    from mlx.utils import tree_map

    from marlin_cli.models.megabyte import MegaByte
    from marlin_cli.models.megabyte_config import MegaByteConfig

    sizes = {"global_layers": 1, "global_dim": 32, "global_heads": 2, "local_layers": 1, "local_dim": 16, "local_heads": 2}
    mx.random.seed(0)
    network = MegaByte(MegaByteConfig(patch_size=4, max_bytes=96, **sizes))
    network.update(tree_map(lambda array: mx.random.normal(array.shape) * 0.3, network.parameters()))
    return network


def calibrated(ranks: Ranks, folder: Path, name: str = "out", **options: Any) -> None:
    """12 windows, or one alone."""
    from marlin_cli.corpus import open_corpus
    from marlin_cli.statistics.shared_run import calibrate_together

    names = [f"{part}={folder / 'corpus' / part}" for part in (("binary", "code") if name == "out" else ("one",))]
    corpus = open_corpus(names, sequence_bytes=96)
    calibrate_together(ranks, network(), corpus, folder / f"{name}.safetensors", model="m", **options)


def answers(ranks: Ranks, folder: Path, **options: Any) -> None:
    """A ByT5's: 7 pairs, and a corpus with spans taken out."""
    import mlx.core as mx
    from mlx.utils import tree_map

    from marlin_cli.corpus import CorruptedCorpus, Pair, PairCorpus, open_corpus
    from marlin_cli.models.byt5 import ByT5
    from marlin_cli.models.byt5_config import ByT5Config
    from marlin_cli.statistics.shared_run import calibrate_together

    mx.random.seed(0)
    byt5 = ByT5(ByT5Config(d_model=32, ffn_dim=64, heads=2, head_dim=16, encoder_layers=1, decoder_layers=1))
    byt5.update(tree_map(lambda array: mx.random.normal(array.shape) * 0.2, byt5.parameters()))
    byt5.eval()
    pairs = [("pairs", Pair(bytes(range(number, 2 * number)), b"answer %d" % number)) for number in range(1, 8)]
    spans = CorruptedCorpus(open_corpus([f"code={folder / 'corpus' / 'code'}"], sequence_bytes=96))
    for name, corpus in (("pairs", PairCorpus(pairs, sequence_bytes=64)), ("spans", spans)):
        calibrate_together(ranks, byt5, corpus, folder / f"{name}.safetensors", model="b", **options)


# What ranks do; each is run in a process of its own, under its name.


def job_together(folder: Path) -> None:
    from marlin_cli.quality.held_out import Windowing, cut, files_by_domain
    from marlin_cli.quality.quality import measure_quality

    seen: list[int] = []
    with joined() as ranks:
        payload = bytes([ranks.rank]) * (3 + 5 * ranks.rank)
        parts = ranks.gather(payload), ranks.gather(b""), ranks.gather(payload * 1000)
        calibrated(ranks, folder, resume=True, on_bytes=seen.append)
        windows = cut(files_by_domain(str(folder / "corpus")), Windowing(48, 20))
        other = network()
        other.output.weight = other.output.weight * 1.1
        found = measure_quality({"tiny": network(), "other": other}, windows, other, ranks=ranks)
        calibrated(ranks, folder, "one")
        answers(ranks, folder)
    print(json.dumps([[list(map(len, part)) for part in parts], repr(found), seen[0]]))


def job_slow(folder: Path) -> None:
    """Rank 0 saves when it is interrupted and not before; rank 1 after each window, since it will be killed."""
    from marlin_cli.statistics import run as run_module

    run_module.SAVE_EVERY_BYTES = 10**9 if is_first() else 0
    seen: list[int] = []

    def slowly(count: int) -> None:
        seen.append(count)
        print(len(seen), flush=True)
        if len(seen) == 3:
            time.sleep(60)

    with joined() as ranks:
        calibrated(ranks, folder, resume=True, on_bytes=slowly)


def job_failing(folder: Path) -> None:
    with joined():
        if not is_first():
            raise CorpusError("no such thing")
        time.sleep(60)


def job_misused(folder: Path) -> None:
    """All are given the same wrong option; rank 1 is the first to find it."""
    with joined():
        if is_first():
            time.sleep(60)
        raise UsageError("no such option")


def job_differing(folder: Path) -> None:
    with joined() as ranks:
        ranks.check_alike(model="m", corpus=str(ranks.rank))


def job_unlike(folder: Path) -> None:
    """Two commands, which have not the same facts."""
    with joined() as ranks:
        ranks.check_alike(**({"version": "1", "model": "m"} if is_first() else {"model": "m"}))


def job_lonely(folder: Path) -> None:
    job.JOIN_SECONDS = 1.0
    with joined():
        raise AssertionError("nobody is there")


def is_first() -> bool:
    return os.environ["MLX_RANK"] == "0"


if __name__ == "__main__":
    try:
        globals()[f"job_{sys.argv[1]}"](Path(sys.argv[2]))
    except MarlinError as error:
        print(f"marlin: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "corpus").mkdir()
    for name, size in (("binary", 500), ("code", 650), ("one", 96)):
        (tmp_path / "corpus" / name).write_bytes(rng.integers(0, 256, size, dtype=np.uint8).tobytes())
    return tmp_path


Start = Callable[..., list["subprocess.Popen[str]"]]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts ranks 0 and 1, or `only` some, of a ring that do a job."""
    started: list[subprocess.Popen[str]] = []

    def starting(job: str, only: tuple[int, ...] = (0, 1)) -> list["subprocess.Popen[str]"]:
        new = start_ring([__file__, job, str(folder)], folder, only=only)
        started.extend(new)
        return new

    yield starting
    for process in started:
        process.kill()
        process.communicate()


def test_two_ranks_of_which_one_is_killed_go_on_to_what_one_process_gives(start: Start, folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as alone:
        job_together(folder)
    # "one" is of a single window, for two ranks.
    files = [folder / f"{name}.safetensors" for name in ("one", "out", "pairs", "spans")]
    expected = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()

    first, second = start("slow")
    for process in (first, second):
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)] == ["1\n", "2\n", "3\n"]
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    [(code, _, errors)] = ended([first])
    assert time.monotonic() - killed < 5
    assert (code, errors) == (1, "marlin: rank 1 of 2 ended without finishing its share\n")
    partial = [f"out.rank-{rank}-of-2.safetensors.partial" for rank in (0, 1)]
    assert sorted(path.name for path in folder.glob("*.partial")) == partial

    first_result, second_result = ended(start("together"))
    assert [(code, errors) for code, _, errors in (first_result, second_result)] == [(0, ""), (0, "")]
    assert [file.read_bytes() for file in files] == expected
    lengths, scores, before = json.loads(first_result[1])
    assert lengths == [[3, 8], [0, 0], [3000, 8000]]
    assert scores == json.loads(second_result[1])[1] == json.loads(alone.getvalue())[1]
    # What was done before the kill comes first and in one: all three windows of rank 0, two at least of rank 1.
    assert before > 2 * 96
    assert json.loads(second_result[1])[2] > 96
    assert sorted(path.name for path in folder.iterdir()) == ["corpus", "hosts.json", *(file.name for file in files)]


def test_a_rank_that_is_asked_to_end_saves_its_share_and_so_does_the_other(start: Start, folder: Path) -> None:
    first, second = start("slow")
    for process in (first, second):
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)] == ["1\n", "2\n", "3\n"]
    first.send_signal(signal.SIGTERM)
    (_, _, errors), (code, _, _) = ended([first, second])
    assert "Terminated" in errors
    assert code == 1
    partial = [f"out.rank-{rank}-of-2.safetensors.partial" for rank in (0, 1)]
    assert sorted(path.name for path in folder.glob("*.partial")) == partial


def test_an_error_of_one_rank_is_said_by_rank_0_alone(start: Start) -> None:
    first, second = ended(start("failing"))
    assert (first[0], first[2]) == (1, "marlin: rank 1 of 2 failed: no such thing\n")
    assert (second[0], second[2]) == (1, "")


def test_a_wrong_option_is_no_rank_s_fault(start: Start) -> None:
    first, second = ended(start("misused"))
    assert (first[0], first[2]) == (2, "marlin: no such option\n")
    assert (second[0], second[2]) == (2, "")


def test_ranks_of_different_jobs_are_refused(start: Start) -> None:
    for name, said in (("differing", "corpus"), ("unlike", "command")):
        first, second = ended(start(name))
        assert (first[0], first[2]) == (1, f"marlin: rank 1 has another {said} than rank 0; start all ranks on the same job\n")
        assert (second[0], second[2]) == (1, "")


def test_a_rank_whose_peers_never_come_gives_up(start: Start) -> None:
    [(code, _, errors)] = ended(start("lonely", only=(0,)))
    assert (code, errors) == (-signal.SIGKILL, "marlin: rank 0 waited 1 s for the others; start all of them with mlx.launch\n")


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("", None),
        ('[["127.0.0.1:1"]]', None),
        ('[["10.0.0.1:1", "10.0.1.1:2"], ["10.0.0.2:1"]]', Launch("ring", 1, ("10.0.0.1", "10.0.1.1"))),
    ],
)
def test_a_ring_is_what_its_hosts_say(hosts: str, expected: Launch | None, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(hosts)
    assert launch_of({"MLX_RANK": "1", "MLX_HOSTFILE": str(tmp_path / "hosts")}) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"MLX_RANK": "3"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, Launch("mpi", 2, (), 2)),
        ({"MLX_RANK": "1", "NCCL_HOST_IP": "10.0.0.1", "MLX_WORLD_SIZE": "2"}, Launch("nccl", 1, ("10.0.0.1",), 1)),
        ({"MLX_RANK": "1", "MLX_JACCL_COORDINATOR": "10.0.0.1:7"}, Launch("jaccl", 1, ("10.0.0.1",))),
    ],
)
def test_launchers_are_known_by_what_they_set(environment: dict[str, str], expected: Launch | None) -> None:
    assert launch_of(environment) == expected


@pytest.mark.parametrize(
    ("given", "gpus", "expected"),
    [({}, 4, "1"), ({}, 2, "1"), ({}, 1, None), ({}, None, None), ({"CUDA_VISIBLE_DEVICES": "3"}, 4, "3")],
)
def test_a_rank_takes_a_gpu_of_its_own(
    given: dict[str, str], gpus: int | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of its machine in a ring; none is chosen where there is but one GPU, or nobody tells."""
    hosts = [["10.0.0.1:1"], ["10.0.0.2:1"], ["10.0.0.3:1"], ["10.0.0.1:2"], ["10.0.0.2:2"], ["10.0.0.1:3"]]
    (tmp_path / "hosts").write_text(json.dumps(hosts))
    found = launch_of({"MLX_RANK": "3", "MLX_HOSTFILE": str(tmp_path / "hosts")})
    assert found is not None and found.local == 1
    monkeypatch.setattr(launch, "GPUS", tmp_path / "gpus")
    for number in range(gpus or 0):
        (tmp_path / "gpus" / str(number)).mkdir(parents=True)
    launch.take_a_gpu(found, given)
    assert given.get("CUDA_VISIBLE_DEVICES") == expected


@pytest.mark.parametrize(
    "text", ["{", '{"a": 1}', "[[1], [2]]", "[[], []]", "[" * 100_000, "1" * 5000, '"\\u001b[31m"', "\xff"]
)
def test_hosts_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text + " ", encoding="latin-1")
    with pytest.raises(DistributedError, match="not a list of lists of address:port|is not JSON|not UTF-8") as caught:
        launch_of({"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts")})
    assert str(caught.value).startswith(f"MLX_HOSTFILE {tmp_path / 'hosts'}: ")
    assert str(caught.value).isprintable()


def test_a_list_of_hosts_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hosts")
    with pytest.raises(DistributedError, match="is a pipe, expected a file"):
        launch_of({"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts")})


@pytest.mark.parametrize(
    "environment",
    [
        {"MLX_RANK": "x", "NCCL_HOST_IP": "10.0.0.1"},
        {"MLX_RANK": "-1", "MLX_JACCL_COORDINATOR": "10.0.0.1:7"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "9" * 5000},
        {"PMI_SIZE": "", "PMI_RANK": "0"},
    ],
)
def test_a_rank_that_is_no_number_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(DistributedError, match="must be a number, as a launcher sets it; found '"):
        launch_of(environment)


def test_nothing_is_imported_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("signal", "time", "enum"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr(job, "JOIN_SECONDS", 1000.0)
    monkeypatch.setattr(job, "_LIMIT", job._LIMIT.replace("while", "print('imported', flush=True)\nwhile"))
    started = job.subprocess.Popen

    monkeypatch.setattr(job.subprocess, "Popen", lambda *a, **k: started(*a, **k, stdout=subprocess.PIPE))
    process = job._limit_of_joining(0)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"imported\n"
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "ran").exists()


GARBAGE = [
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"[]\n",
    b"null\n",
    b'{"token": 1, "rank": 1}\n',
    b'{"token": "\xc3\xa9", "rank": 1}\n',
    b'{"token": "TOKEN", "rank": 2}\n',
    b'{"token": "TOKEN", "rank": "x"}\n',
    b'{"token": "TOKEN"}\n',
    b"[" * 10_000 + b"\n",
    b"1" * 100_000,
    b"\xff\n",
]


def test_whoever_else_connects_to_rank_0_is_hung_up_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        silent = socket.create_connection(address)
        others = [socket.create_connection(address) for _ in GARBAGE]
        for plug, data in zip(others, GARBAGE, strict=True):
            plug.sendall(data.replace(b"TOKEN", b"secret"))
            plug.shutdown(socket.SHUT_WR)
        member = Connection(socket.create_connection(address))
        member.send(token="secret", rank=1)
        found = job._joining(server, 2, "secret")
        assert list(found) == [1]
        member.send(hello="there")
        assert found[1].receive() == {"hello": "there"}
        for plug in (silent, *others):
            plug.close()
        member.close()
        found[1].close()


@pytest.mark.parametrize("data", [b"x" * 100_000, b"7\n", b'{"a": \n', b"[" * 9000 + b"\n"])
def test_what_no_rank_says_ends_a_connection(data: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = socket.create_connection(server.getsockname())
        connection = Connection(server.accept()[0])
    there.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        there.sendall(data)  # and goes on, for all that the other side knows
    assert connection.receive() is None
    connection.close()
    there.close()


@pytest.fixture
def connected() -> Iterator[tuple[Connection, Connection]]:
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = Connection(socket.create_connection(server.getsockname()))
        other = Connection(server.accept()[0])
    yield one, other
    one.close()
    other.close()


def test_bytes_follow_the_message_that_counts_them(connected: tuple[Connection, Connection]) -> None:
    one, other = connected
    data = bytes(range(256)) * 40
    one.send(data, bytes=len(data))
    one.send(beat=True)
    assert other.receive() == {"bytes": len(data)}
    assert other.payload(len(data)) == data
    assert other.receive() == {"beat": True}


@pytest.mark.parametrize("size", [-1, 1 << 40, "5", None, 2.0])
def test_a_count_of_bytes_that_no_rank_sends_ends_a_connection(size: Any, connected: tuple[Connection, Connection]) -> None:
    assert connected[0].payload(size) is None


def test_messages_are_told_by_their_sender_and_waited_for_no_longer_than_asked(
    connected: tuple[Connection, Connection],
) -> None:
    first, second = Watch(0, 2, {1: connected[0]}), Watch(1, 2, {0: connected[1]})
    first.start()
    second.start()
    second.send(0, b"from 1")
    second.send(0, b"")
    assert first.receive(10) == (1, b"from 1")
    assert first.receive(10) == (1, b"")
    assert first.receive(0) is None
    first.send(1, b"from 0")
    assert second.receive(None) == (0, b"from 0")
    first.close()
    second.close()


def test_a_process_that_nothing_launched_is_alone() -> None:
    with joined() as ranks:
        assert ranks is ALONE
        assert ranks.gather(b"x") == [b"x"]
    assert not is_follower()


def test_a_deaf_rank_ends_when_another_is_lost_and_not_before(connected: tuple[Connection, Connection]) -> None:
    watch = Watch(1, 2, {0: connected[0]})
    ranks = Ranks(1, 2, watch)
    before = signal.getsignal(signal.SIGINT)
    with ranks.deaf():
        watch.stop(signal.SIGTERM, None)
        os.kill(os.getpid(), signal.SIGINT)
        watch.lost = "rank 0 of 2 ended"
        with pytest.raises(KeyboardInterrupt):
            watch.stop(signal.SIGTERM, None)
    assert signal.getsignal(signal.SIGINT) is before
    with ALONE.deaf(), ALONE.computing():
        pass
