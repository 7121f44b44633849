"""README and docs say what is so: options and fields as the code has them, commands that parse, links that lead somewhere."""

import os
import re
import shlex
from pathlib import Path

import pytest

from tools import fields, house, options, outputs
from tools.marked import pages, rewritten

ROOT = Path(__file__).resolve().parents[1]
PAGES = pages(ROOT)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands_in(text: str) -> list[list[str]]:
    """The words of each `marlin COMMAND ..` that stands in a block of code, up to the next pipe or the like."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
    found = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        for words in re.findall(r"(?:^\s*(?:\$ )?|\| |-n \d+ )marlin ([a-z]+ [^\n]*)", line):
            lexer = shlex.shlex(words.replace("[--", "--").replace(" ..", ""), posix=True, punctuation_chars="|&;>]")
            lexer.whitespace_split, lexer.commenters = True, "#"
            spoken = []
            for word in lexer:
                if set(word) <= set("|&;>"):
                    break
                spoken.append(word)
            found.append(spoken)
    return found


def test_readme_is_read_in_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("kind, table_of", [("options", options.table_of), ("fields", fields.table_of)])
def test_tables_are_as_the_code_has_them(kind, table_of):
    stale = [name_of(page) for page in PAGES if rewritten(text := page.read_text(encoding="utf-8"), kind, table_of) != text]
    assert not stale, "run make docs-options"


def test_every_command_has_a_page_with_all_its_options():
    for command in options.commands():
        text = (ROOT / f"docs/commands/{command}.md").read_text(encoding="utf-8")
        assert f"<!-- options: {command} -->" in text
        assert all(f"`{option}`" in text for option in options.options_of(command) - {"-h", "--help"} if option[0] == "-")


@pytest.mark.parametrize("page", [page for page in PAGES if "/log/" not in str(page)], ids=name_of)
def test_commands_name_options_that_are_there(page):
    known = {name: options.options_of(name) for name in options.commands()}
    for name, *words in commands_in(page.read_text(encoding="utf-8")):
        assert name in known, f"marlin {name}"
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= known[name], f"marlin {name} has no {', '.join(given - known[name])}"


def test_commands_are_found_in_blocks():
    text = "`marlin none`\n\n```console\n$ echo x | marlin generate m -p 'a b' \\\n  --raw | xxd\n--no\n```\n"
    text += "\n    marlin info\n    marlin bench x > y\n"
    assert commands_in(text) == [["generate", "m", "-p", "a b", "--raw"], ["bench", "x"]]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}


def test_the_picture_has_every_room():
    drawn = house.picture()
    assert all(f">{room}</text>" in drawn for room in house.rooms())
    assert "#c0392b" not in drawn  # no room imports from its right


def test_marked_parts_alone_are_rewritten():
    text = "a\n<!-- kind: x -->\nold\n<!-- end of kind -->\nb <!-- kind: y -->\n"
    assert rewritten(text, "kind", str.upper) == text.replace("old", "X")


def test_steps_of_a_block():
    steps = outputs.steps_of("$ one \\\n  more\nsaid\n\n$ two\n$ three\nx")
    assert steps == [outputs.Step("one \\\n  more", "said\n"), outputs.Step("two", ""), outputs.Step("three", "x")]
    with pytest.raises(ValueError, match="begins with a command, found 'x'"):
        outputs.steps_of("x")


def test_outputs_are_run_and_cut_where_they_were(tmp_path):
    text = "<!-- run -->\n```console\n$ seq 9\n1\n...\nz\n$ echo $((2 + 2)) > f; cat f\n```\nrest"
    done = outputs.run_page(text, tmp_path)
    assert done == "<!-- run -->\n```console\n$ seq 9\n1\n...\n9\n$ echo $((2 + 2)) > f; cat f\n4\n```\nrest"


def test_what_goes_on_in_the_background_ends_with_the_page(tmp_path, monkeypatch):
    ended, end = [], os.killpg
    monkeypatch.setattr(outputs.os, "killpg", lambda group, number: (ended.append(group), end(group, number)))
    text = "<!-- run -->\n```console\n$ sleep 600 > log 2>&1 & echo $$ > group; kill -0 $! && echo there\nx\n```\n"
    assert "\nthere\n" in outputs.run_page(text, tmp_path)
    assert ended == [int((tmp_path / "group").read_text())]


def test_a_table_without_the_kernels_name_stays_straight():
    said = "devices        cpu\nsystem   Linux 6.1, 2\nLinux 6.1\n"
    assert outputs._without_release(said, "6.1") == "devices        cpu\nsystem       Linux, 2\nLinux\n"


def test_a_command_that_fails_ends_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="exit code 3"):
        outputs.run_page("<!-- run -->\n```console\n$ exit 3\n```\n", tmp_path)


def test_outputs_may_differ_in_numbers_alone():
    assert outputs.same_but_numbers("a  1,234.5 x +0.1e-03", "a 7 x 2")
    assert not outputs.same_but_numbers("a 1 x", "a 1 y")


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if outputs.BLOCK.search(page.read_text(encoding="utf-8"))], ids=name_of
)
def test_outputs_are_what_commands_say(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    if "MEGABYTE_pytorch" in text:
        pytest.importorskip("MEGABYTE_pytorch")
    assert outputs.same_but_numbers(outputs.run_page(text, tmp_path), text), "run make docs-output and read what changed"
