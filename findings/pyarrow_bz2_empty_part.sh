#!/usr/bin/env bash
# pyarrow cannot read a bzip2 file in several parts of which one is empty; bzip2 itself and Python's bz2 read it.
#
# A file of several streams one after the other is what parallel compressors and `cat a.bz2 b.bz2` make, and an empty file
# packs to a stream of 14 bytes. pyarrow ends with an internal error of its own calls, as if the file were damaged.
# Seen with pyarrow 26.0.1: ArrowException, "bz2 decompress failed: wrong sequence of calls to bz2 library (internal error)".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "pyarrow==26.0.1"
"$folder/venv/bin/python" - <<'PYTHON'
import bz2

import pyarrow

part = bz2.compress(b"abc" * 5000)
whole = part + bz2.compress(b"") + part
print("Python's bz2 reads", len(bz2.decompress(whole)), "bytes")
try:
    found = len(pyarrow.CompressedInputStream(pyarrow.BufferReader(whole), "bz2").read())
except pyarrow.ArrowException as error:
    found = str(error)
print("pyarrow:", found)
assert len(bz2.decompress(whole)) == 30000 and "wrong sequence of calls" in str(found), "pyarrow behaves otherwise now"
PYTHON
