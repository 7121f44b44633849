#!/usr/bin/env bash
# The JSON reader of Hugging Face datasets turns text that looks like a date into a date, if all texts of a file do.
#
# A column of strings such as "2024-01-02" becomes one of timestamps: other types, other bytes, and another type again when
# one row is a word. The file says strings; nothing asked for dates. Streaming does the same.
# Seen with datasets 5.2.0: {'text': Value('timestamp[s]')} and datetime.datetime(2024, 1, 2, 0, 0).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "datasets==5.2.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import datetime
import json
import pathlib

import datasets

datasets.disable_progress_bars()


def rows(name, *texts):
    pathlib.Path(name).write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = datasets.load_dataset("json", data_files=name, split="train", streaming=True)
    return found.features, [row["text"] for row in found]


features, dates = rows("dates.jsonl", "2024-01-02", "2024-05-06T07:08:09")
_, mixed = rows("mixed.jsonl", "2024-01-02", "a word")
print(features, dates, mixed)
assert dates[0] == datetime.datetime(2024, 1, 2) and mixed == ["2024-01-02", "a word"], "datasets behaves otherwise now"
PYTHON
