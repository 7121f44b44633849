"""Notes and tables where their reader has gone: they are lost, and nothing else is."""

import os
import subprocess
import sys

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
