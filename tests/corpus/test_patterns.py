"""Patterns and folders: loops of links end, and what is no file is never opened."""

import os
import socket
from pathlib import Path

import pytest

from marlin_cli.corpus import parse_source
from marlin_cli.corpus.patterns import files_matching
from marlin_cli.errors import CorpusError, MarlinError


@pytest.fixture(autouse=True)
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/b/f.txt", "a/g.txt", "a/.hidden.txt", ".h/x.txt", "c/f.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x" * 100)
    for number in range(6):  # a walk that follows them has 6 ways at each of 40 levels
        os.symlink("..", f"a/up{number}")
        os.symlink("../..", f"a/b/top{number}")
    os.mkfifo("a/b/pipe.txt")
    os.symlink("f.txt", "a/b/linked.txt")
    os.symlink("gone", "a/b/dangling.txt")
    os.symlink("/dev/zero", "a/b/endless.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("a/b/socket.txt")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**", ["a/b/f.txt", "a/b/linked.txt", "a/g.txt", "c/f.txt"]),
        ("**/*.txt", ["a/b/f.txt", "a/b/linked.txt", "a/g.txt", "c/f.txt"]),
        ("a", ["a/b/f.txt", "a/b/linked.txt", "a/g.txt"]),
        ("./a/*.txt", ["a/g.txt"]),
        ("**/b/**/f.*", ["a/b/f.txt"]),
        ("[ac]/**/[!l]?txt", ["a/b/f.txt", "a/g.txt", "c/f.txt"]),
        ("?/f.txt", ["c/f.txt"]),
        (".h/*", [".h/x.txt"]),
        ("a/.*", ["a/.hidden.txt"]),
        ("a/../c/*", ["a/../c/f.txt"]),
        ("c/**", ["c/f.txt"]),
    ],
)
def test_what_a_pattern_names(pattern, expected, tmp_path):
    for start in ("", f"{tmp_path}/"):
        (source,) = parse_source(start + pattern)
        assert source.files == tuple(Path(start + each) for each in expected)


def test_a_pattern_through_links_enters_each_folder_once():
    found = list(files_matching("*/*/*/*/*/*/*/*/*/*/*/*.txt"))
    assert len(found) == len({path.resolve() for path in found if path.exists()} | {p for p in found if not p.exists()}) + 1


@pytest.mark.parametrize("name", ["a/b/pipe.txt", "a/b/socket.txt", "a/b/endless.txt", "/dev/null"])
def test_what_is_no_file_is_refused(name):
    with pytest.raises(CorpusError, match=f"^{name}: is not a regular file; pipe its bytes in and name -$"):
        parse_source(name)


NAMES = ["nul\0", "nul\0*", "x" * 5000, "*" + "x" * 5000, "\udcff", "\ud800", "\ud800*", "*/\ud800", "a\x1b[31m\n", "[" * 99]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("place", ["named", "recipe", "checksums", "listed"])
def test_names_that_are_none(name, place):
    if place == "named":
        text = name
    else:
        path = name if place == "recipe" else "c/f.txt"
        sums = {"checksums": name, "listed": "SUMS"}.get(place)
        escaped = {key: "".join(f"\\U{ord(each):08x}" for each in value) for key, value in (("p", path), ("s", sums or ""))}
        line = f'checksums: "{escaped["s"]}"\n' if sums else ""
        Path("mine.yaml").write_text(line + f'sources: [{{domain: code, path: "{escaped["p"]}"}}]')
        Path("SUMS").write_bytes(b"0" * 64 + b"  " + name.encode("utf-8", "surrogatepass"))
        text = "mine.yaml"
    with pytest.raises(MarlinError) as caught:
        parse_source(text)
    assert place == "listed" or (len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_bytes: " + "9" * 5000, "cannot read as YAML"),
        ("max_bytes: 0x" + "f" * 5000, "max_bytes must be at least 1 and at most 9223372036854775807"),
        ("max_bytes: -0x" + "f" * 5000, "max_bytes must be at least 1 and at most"),
        ("seq_bytes: 2000000000", "seq_bytes must be at least 1 and at most 1073741824"),
        ("? 0x" + "f" * 5000 + "\n: 1", "unknown key"),
        ("[1]: 1", "cannot read as YAML|unknown key"),
        ("? {a: 1}\n: 1", "cannot read as YAML"),
        ("checksums: pipe", "pipe: is a pipe, expected a file"),
    ],
)
def test_recipes_with_impossible_values(text, message):
    os.mkfifo("pipe")
    Path("mine.yaml").write_text(f"{text}\nsources: [{{domain: code, path: c}}]")
    with pytest.raises(MarlinError, match=f"^(mine.yaml: .*)?({message})") as caught:
        parse_source("mine.yaml")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("weight", ["1e999", "0x" + "f" * 5000, "9" * 5000, ".nan", "-1", "text"])
def test_weights_that_are_none(weight):
    Path("mine.yaml").write_text(f"sources: [{{domain: code, path: c, weight: {weight}}}]")
    with pytest.raises(MarlinError, match="mine.yaml") as caught:
        parse_source("mine.yaml")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_a_recipe_that_is_a_pipe_is_refused():
    os.mkfifo("pipe.yaml")
    with pytest.raises(CorpusError, match="pipe.yaml"):
        parse_source("pipe.yaml")
