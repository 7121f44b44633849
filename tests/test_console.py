"""Notes and tables where their reader has gone: they are lost, and nothing else is."""

import functools
import os
import subprocess
import sys

from marlin_cli import console

CODE = """
import sys
from marlin_cli import console
console.note("a note")
console.table("a table", ["a"], [["b"]])
console.failure("a failure")
print("the result")
"""


def test_what_stderr_does_not_take_is_no_failure():
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert (result.returncode, result.stdout) == (0, b"the result\n")


def test_a_title_is_one_line_and_the_table_as_wide_as_it_needs(capsys):
    title = "a title that is much longer than the table below it, by far"
    console.table(title, ["", "b"], [["a", "1"]], to_stdout=True)
    assert capsys.readouterr().out == f"{title}\n   b\na  1\n"


def test_what_a_terminal_has_no_room_for_stands_below(capsys, monkeypatch):
    narrow = functools.partial(console.Console, width=20, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "Console", narrow)
    console.table("title", ["name", "first", "second", "third"], [["a", "1,000,000", "2", "3"]], to_stdout=True)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["title"], ["name", "first"], ["a", "1,000,000"], ["name", "second", "third"], ["a", "2", "3"]]


def test_long_work_says_a_line_now_and_then_where_nothing_moves(capsys, monkeypatch):
    now = iter([0.0, 5.0, 11.0, 12.0, 22.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.byte_progress("packing", 4000) as progress:
        for _ in range(4):
            progress.advance(1000)
    assert capsys.readouterr().err.splitlines() == ["packing: 2,000 bytes, 50%", "packing: 4,000 bytes, 100%"]


def test_a_table_whose_reader_has_gone_is_a_broken_pipe():
    code = """
from marlin_cli import console
try:
    for _ in range(2):
        console.table("a table", ["a"], [["b"]], to_stdout=True)
except BrokenPipeError:
    console.note("gone")
"""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert b"gone" in result.stderr and b"Traceback" not in result.stderr
