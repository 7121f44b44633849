"""JSON and YAML from other hands: each of these once ended in a traceback, took memory without end, or waited for ever."""

import os

import pytest

from marlin_cli.documents import MOST_JSON_BYTES, MOST_YAML_BYTES, parse_json, parse_yaml, read_json, read_yaml
from marlin_cli.errors import ConfigError, CorpusError

JSON = {
    "no JSON": (b"{,}", "is not JSON"),
    "nothing": (b"", "is not JSON"),
    "nested": (b"[" * 100_000, "is not JSON"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    "not UTF-8": (b'"\xff"', "is not UTF-8, as JSON is: invalid start byte at byte 1"),
}

YAML = {
    "no YAML": (b"a: [", "cannot read as YAML"),
    "nested": (b"[" * 10_000, "cannot read as YAML"),
    "digits": (b"a: " + b"9" * 5000, "cannot read as YAML"),
    "not UTF-8": (b"a: \xff", "cannot read as YAML"),
    "control characters": (b"a: \x01", "cannot read as YAML"),
    "a key that is a list": (b"? [a]\n: b", "cannot read as YAML"),
    "a day that is none": (b"a: 2001-99-99", "cannot read as YAML"),
    "an object": (b"!!python/object/apply:os.getcwd []", "cannot read as YAML"),
    "a merge of no table": (b"<<: 1", "cannot read as YAML"),
    "a character of none": (b'a: "\\UFFFFFFFF"', "cannot read as YAML"),
    "aliases": (b"a: &a [x, x]\nb: &b [*a, *a]", r"an alias \(\*name\); write the value itself"),
    "a list that holds itself": (b"&a [*a]", "an alias"),
    "a number without digits": (b"a: !!int ''", "cannot read as YAML"),
    "a set of lists": (b"!!set {[a]: }", "cannot read as YAML"),
}


@pytest.mark.parametrize("case", JSON)
def test_bad_json_is_one_error(case):
    text, says = JSON[case]
    with pytest.raises(CorpusError, match=f"here: {says}") as caught:
        parse_json(text, "here", CorpusError)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("case", YAML)
def test_bad_yaml_is_one_error(case):
    text, says = YAML[case]
    with pytest.raises(CorpusError, match=says) as caught:
        parse_yaml(text, "here", CorpusError)
    assert str(caught.value).isprintable()


def test_a_mark_of_utf_8_is_no_error():
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "here", ConfigError) == {"a": 1}


@pytest.mark.parametrize(("read", "most"), [(read_json, MOST_JSON_BYTES), (read_yaml, MOST_YAML_BYTES)])
def test_files_of_any_kind_come_back_at_once(read, most, tmp_path):
    path = tmp_path / "file"
    for make, says in (
        (lambda: None, "no such file"),
        (lambda: path.mkdir(), "is a folder, expected a file"),
        (lambda: os.mkfifo(path), "is a pipe, expected a file"),
        (lambda: path.symlink_to("/dev/zero"), "is a device, expected a file"),
        (lambda: path.symlink_to(path), "cannot read: Too many levels"),
        (lambda: path.write_bytes(b" " * (most + 1)), f"is larger than {most:,} bytes"),
    ):
        make()
        with pytest.raises(ConfigError, match=says):
            read(path)
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_what_is_no_name_of_a_file(name, tmp_path):
    with pytest.raises(ConfigError, match="is no name of a file|cannot read: File name too long"):
        read_json(tmp_path / name)
