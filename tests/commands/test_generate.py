"""`marlin generate` as a user runs it: a real process, real pipes."""

import base64
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from small_networks import FIRST_DEMO

MARLIN = [sys.executable, "-m", "marlin_cli", "generate"]


def run(*arguments, stdin=b"", check=True):
    result = subprocess.run([*MARLIN, *arguments], input=stdin, capture_output=True, timeout=120)
    if check:
        assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def expected(demo):
    return demo.generate(b"def main(", max_bytes=24)


def test_stdout_is_exactly_the_bytes_whichever_way_the_prompt_comes(expected, tmp_path):
    file = tmp_path / "prompt"
    file.write_bytes(b"def main(")
    for arguments, stdin in (
        (["-p", "def main("], b""),
        (["--hex", "646566206d61696e28"], b""),
        (["--prompt-file", str(file)], b""),
        ([], b"def main("),
        (["--prompt-file", "-", "--raw"], b"def main("),
    ):
        assert run(*arguments, "--max-bytes", "24", stdin=stdin).stdout == expected


def test_raw_bytes_go_through_a_shell_pipeline(demo):
    script = f"head -c 4096 /dev/zero | '{sys.executable}' -m marlin_cli generate --raw --max-bytes 16 | od -An -tx1 -v"
    result = subprocess.run(script, shell=True, capture_output=True, timeout=180)
    assert bytes.fromhex(result.stdout.decode().replace("\n", "")) == demo.generate(bytes(4096), max_bytes=16)


def takes_interrupts():
    """A background job of a shell ignores Ctrl-C, and its children with it; this one must not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_each_byte_leaves_as_soon_as_it_is_decoded():
    command = [*MARLIN, "-p", "x", "--max-bytes", "100k", "--temperature", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=takes_interrupts) as job:
        assert len(job.stdout.read(20)) == 20
        assert job.poll() is None
        job.send_signal(signal.SIGINT)
        job.stdout.read()
    assert job.returncode == 130


def test_a_closed_pipe_ends_quietly():
    generate = f"MARLIN_KERNELS=reference '{sys.executable}' -m marlin_cli generate -p x --max-bytes 100k"
    script = f"{generate} | head -c 5; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, timeout=120)
    assert result.stdout[5:].strip() == b"0" and result.stderr == b""


def test_json_says_bytes_text_timing_and_reason(expected):
    document = json.loads(run("-p", "def main(", "--max-bytes", "24", "--json").stdout)
    assert base64.b64decode(document["bytes_base64"]) == expected
    assert document["text"] == expected.decode("utf-8", "replace")
    assert (document["prompt_bytes"], document["generated_bytes"], document["stop_reason"]) == (9, 24, "length")
    assert 0 < document["first_byte_ms"] <= document["wall_ms"]


def test_prompts_of_a_file_come_back_in_order_with_their_names(demo, tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = ['"abc"', '{"prompt": "d\\u00e9", "id": "two"}', '{"prompt_base64": "AP8="}', '{"prompt_hex": ""}', ""]
    file.write_text("\n".join(lines))
    output = run("--prompts", str(file), "--max-bytes", "5", "--batch-size", "3").stdout.splitlines()
    documents = [json.loads(line) for line in output]
    assert [document["index"] for document in documents] == [0, 1, 2, 3]
    assert [document.get("id") for document in documents] == [None, "two", None, None]
    for document, prompt in zip(documents, (b"abc", "dé".encode(), b"\x00\xff", b""), strict=True):
        assert base64.b64decode(document["bytes_base64"]) == demo.generate(prompt, max_bytes=5)


def test_stops_are_bytes(expected):
    stop = expected[5:8]
    assert run("-p", "def main(", "--max-bytes", "24", "--stop-hex", stop.hex()).stdout == expected[: expected.index(stop)]


def test_a_terminal_sees_whole_characters_and_no_control_codes():
    from marlin_cli.commands.writers import TerminalView

    view = TerminalView()
    shown = [view.push(bytes([byte])) for byte in "é\x1b[31m\n中".encode() + b"\xff\xc3"]
    assert shown[:2] == [b"", "é".encode()] and b"\x1b" not in b"".join(shown)
    assert b"".join(shown) + view.flush() == "é�[31m\n中��".encode()


def test_on_a_terminal_the_output_is_text(expected):
    parent, child = pty.openpty()
    with subprocess.Popen([*MARLIN, "-p", "def main(", "--max-bytes", "24"], stdin=child, stdout=child, stderr=child):
        os.close(child)
        data = b""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                part = os.read(parent, 1024)
            except OSError:
                break
            if not part:
                break
            data += part
    os.close(parent)
    first = expected.decode("utf-8", "replace").splitlines()[0]
    assert first.encode() in data and b"24 bytes out (length)" in data


def test_a_context_that_is_full_is_said(tmp_path):
    (tmp_path / "long").write_bytes(bytes(32_760))
    result = run(str(FIRST_DEMO), "--prompt-file", str(tmp_path / "long"), "--max-bytes", "64")
    assert len(result.stdout) == 8 and b"the model's context is full" in result.stderr
    assert b"context is full" not in run("-p", "a", "--max-bytes", "4").stderr


def test_a_prompt_without_its_option_is_told_where_to_go():
    result = run("megabyte-demo", "Hello", check=False)
    assert result.returncode == 2 and b"a text is given with -p" in result.stderr


def test_a_prompt_too_long_is_named(tmp_path):
    (tmp_path / "long").write_bytes(bytes(40_000))
    (tmp_path / "p.jsonl").write_text('"a"\n"' + "x" * 40_000 + '"\n')
    for arguments, where in (
        (["--prompt-file", tmp_path / "long"], tmp_path / "long"),
        (["--prompts", tmp_path / "p.jsonl"], f"{tmp_path / 'p.jsonl'}: line 2"),
    ):
        result = run(*map(str, arguments), check=False)
        assert result.returncode == 2 and not result.stdout
        assert result.stderr.decode() == f"marlin: {where}: 40,000 bytes, but the model reads 32,768; give the last ones\n"
