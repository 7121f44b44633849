"""`marlin serve` by two ranks: the bytes of one process, whichever rank a stream runs on; signals, and a rank that dies."""

import http.client
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import shared_models
from ring import ended, ring


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models")
    shared_models.write(folder, "grouped")
    return folder


def port_of(server: Any) -> int:
    """Where rank 0 listens, once it does."""
    line = server.stderr.readline()
    assert " at http://127.0.0.1:" in line, line
    return int(line.rpartition(":")[2])


def asked(port: int, prompt: str, count: int = 24) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps(
        {"prompt": [*prompt.encode()], "max_tokens": count, "temperature": 0.8, "seed": 3, "return_token_ids": True}
    )
    connection.request("POST", "/v1/completions", body)
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return bytes(answer["choices"][0]["token_ids"])


@pytest.mark.parametrize("split", [[], ["--split", "global"]])
def test_ranks_serve_what_one_process_generates(split: list[str], folder: Path) -> None:
    from marlin_cli.api import MegaByteModel

    prompts = ["a", "abc", "The rest is here.", "0123456789"]
    model = MegaByteModel.from_pretrained(folder / "grouped", device="cpu")
    expected = {prompt: model.generate(prompt.encode(), 24, 0.8, seed=3) for prompt in prompts}
    command = ["-m", "marlin_cli", "serve", str(folder / "grouped"), "--port", "0", "--device", "cpu", *split]
    with ring(command, folder) as (first, second):
        port = port_of(first)
        found: dict[str, bytes] = {}
        threads = [threading.Thread(target=lambda each=each: found.update({each: asked(port, each)})) for each in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == expected
        for process in (second, first):  # as a launcher does
            process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        codes = [code for code, _, _ in ended([first, second])]
        assert time.monotonic() - begun < 5
    assert codes == [0, 0]


def test_a_rank_that_dies_ends_the_server_within_two_seconds(folder: Path) -> None:
    command = ["-m", "marlin_cli", "serve", str(folder / "grouped"), "--port", "0", "--device", "cpu"]
    with ring(command, folder) as (first, second):
        port_of(first)
        second.kill()
        begun = time.monotonic()
        [(code, _, errors)] = ended([first])
        assert time.monotonic() - begun < 2
    assert code == 1
    assert "marlin: rank 1 of 2 ended without finishing its share" in errors
