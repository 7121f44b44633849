"""Texts of a corpus: cut where characters begin and end, without what is no UTF-8, and where a run left off."""

import pytest

from marlin_cli.corpus import TextCorpus, open_corpus
from marlin_cli.corpus.texts import whole_characters
from marlin_cli.errors import CorpusError

TEXT = "naïve café — 文字 \N{MATHEMATICAL FRAKTUR CAPITAL U} \x00 end ".encode()


def test_every_cut_of_a_text_is_one():
    for first in range(len(TEXT)):
        for end in range(first, len(TEXT) + 1):
            found = whole_characters(TEXT[first:end])
            assert found is not None and found in TEXT
            # No character that is whole in the window is lost.
            assert found.decode() == TEXT[first:end].decode(errors="ignore")


@pytest.mark.parametrize(
    "window",
    [b"ab\xff", b"\xffab", b"a\xc3b", b"\xf8\x88\x80\x80\x80a", b"ab\x80\x80\x80\x80", b"a\xed\xa0\x80b"],
)
def test_what_is_no_text(window):
    assert whole_characters(window) is None


def corpus(tmp_path, **options):
    (tmp_path / "a.txt").write_bytes(TEXT * 40)
    (tmp_path / "b.bin").write_bytes(bytes(range(255, 127, -1)) * 8)
    return TextCorpus(open_corpus([str(tmp_path)], **{"sequence_bytes": 100, **options}))


def test_windows_that_are_no_text_are_counted(tmp_path):
    found = corpus(tmp_path)
    texts = list(found)
    assert found.left_out == 10 and len({text.index for text in texts}) == len(texts)
    assert all(text.data.decode() and len(text.data) <= 100 for text in texts)
    total = sum(len(text.data) for text in texts)
    assert len(TEXT) * 40 - 6 * len(texts) <= total <= len(TEXT) * 40


def test_going_on_where_another_left_off(tmp_path):
    whole = corpus(tmp_path)
    texts = list(whole)
    for place in range(0, len(texts), 5):
        first = corpus(tmp_path)
        before = [text for _, text in zip(range(place), first, strict=False)]
        again = corpus(tmp_path)
        again.resume(first.state())
        assert [*before, *again] == texts
        assert again.left_out == whole.left_out
    with pytest.raises(CorpusError, match="damaged"):
        corpus(tmp_path).resume({**whole.state(), "left_out": -1})
    assert corpus(tmp_path).fingerprint() != corpus(tmp_path, sequence_bytes=99).fingerprint()
    assert corpus(tmp_path).fingerprint() != open_corpus([str(tmp_path)], sequence_bytes=100).fingerprint()
