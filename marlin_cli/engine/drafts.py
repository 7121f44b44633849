"""Where drafts of what follows a text come from: places in it, or in a prediction, that read alike. Nothing is verified."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

# Bytes that a place has in common with the end of the text, at least: shorter matches are seldom right.
LEAST_MATCH = 16
# Bytes that do where drafts were taken from before, and how far around that place they are looked for.
LEAST_NEAR_MATCH, NEAR_BYTES = 4, 256
# Bytes that speak for the beginning of a prediction, which somebody has given for what follows.
TRUSTED = 32
# How often a byte is thought to stay what it is where characters may be others, and of how many, before any was seen.
KEPT_AT_FIRST = 3.7, 4.0
# Places that are compared for the longest match, newest first; and how many bytes more than `LEAST_MATCH`.
MOST_PLACES, MOST_COMPARED = 16, 48


class Draft(NamedTuple):
    """What may follow a text.

    Attributes:
        match: how many bytes speak for it.
        chances: that each byte of it is right if those before it are, where more is known than that.
    """

    data: bytes
    match: int
    chances: Sequence[float] = ()


class DraftSource(Protocol):
    """Guesses what follows one text, which grows.

    Attributes:
        is_free: does a draft take no time worth counting, so that it may be thought of without being tried?
    """

    is_free: bool

    def push(self, data: bytes) -> None:
        """The text goes on."""

    def draft(self, count: int) -> Draft | None:
        """What may follow, `count` bytes at most; None where nothing speaks for anything."""


class TextDrafts:
    """Drafts out of a prediction and out of the text itself.

    A draft that was right is gone on with. Where it was wrong, what follows is looked for by the longest match with the end of
    the text, and next to where it was wrong, as an edited line is followed by one that is not: there a short match does.

    Args:
        prediction: what may follow the text, or parts of it. Nothing needs to match for its beginning.
        text: so far.
        resumes: where a draft was wrong, is a character thought to stand for one, so that it goes on behind both at once?
    """

    is_free = True

    def __init__(self, prediction: bytes = b"", text: bytes = b"", *, resumes: bool = False) -> None:
        self._text = bytearray()  # the prediction, then the text
        self._end, self._resumes = len(prediction), resumes  # of the prediction
        self._newest: dict[bytes, int] = {}  # where what comes after these bytes begins
        self._before: list[int] = []  # by place, the next newest one after the same bytes; -1: none
        self._index(prediction)
        self._index(text)
        self._place: int | None = 0 if prediction else None  # where the text is thought to go on
        self._right = TRUSTED if prediction else 0  # bytes before that place that the text has too
        self._since = 0  # bytes of the text since a draft was wrong
        # Of a character that has begun in place of one at `_began`: what is thought to end it, and how many bytes of it came.
        self._ending, self._began, self._came = b"", 0, 0
        self._kept = [list(KEPT_AT_FIRST) for _ in range(256)]  # by byte, how often it stayed what it was, and of how many
        self._stands_for: dict[bytes, bytes] = {}  # by character, what came in its place

    def push(self, data: bytes) -> None:
        self._index(data)
        for end, byte in enumerate(data, start=len(self._text) - len(data)):
            if self._place is None:
                return
            if self._ending and not self._since:
                self._end_character(byte)
            elif self._place >= end:  # what was copied from has no more bytes than the text itself
                self._place = None
            elif self._since:
                self._since += 1
            else:
                is_same = self._text[self._place] == byte
                kept = self._kept[self._text[self._place]]
                kept[0], kept[1] = kept[0] + is_same, kept[1] + 1
                if is_same:
                    self._place, self._right = self._place + 1, self._right + 1
                else:
                    self._right, self._since = 0, 1

    def draft(self, count: int) -> Draft | None:
        found = self._follow()
        if found is None:
            self._ending = b""
            found = self._longest() or self._near() or self._resumed()
        if found is None or count < 1:
            return None
        self._place, self._right = found
        self._since = 0
        if self._place < self._end:
            known = self._ending + self._text[self._place : min(self._place + count, self._end)]
            chances = tuple(kept / came for kept, came in map(self._kept.__getitem__, known[:count])) if self._resumes else ()
            return Draft(bytes(known[:count]), self._right, chances)
        data = bytearray(self._text[self._place : self._place + count])
        while len(data) < count and self._place + len(data) >= len(self._text):
            data += data[: count - len(data)]  # what is copied reaches its own beginning, and repeats itself
        return Draft(bytes(data), self._right)

    def _follow(self) -> tuple[int, int] | None:
        """Where the last draft goes on, all of which was right."""
        if self._place is None or self._since or self._place in (self._end, len(self._text)):
            return None
        return self._place, self._right

    def _longest(self) -> tuple[int, int] | None:
        """The longest match with the end of the text, of equal ones the newest."""
        end, best = len(self._text), None
        place = self._newest.get(bytes(self._text[-LEAST_MATCH:]), -1) if end >= LEAST_MATCH else -1
        if place == end:
            place = self._before[end]
        for _ in range(MOST_PLACES):
            if place < 0:
                break
            match = LEAST_MATCH
            most = min(place, LEAST_MATCH + MOST_COMPARED)
            while match < most and self._text[place - match - 1] == self._text[end - match - 1]:
                match += 1
            if best is None or match > best[1]:
                best = place, match
            place = self._before[place]
        return best

    def _near(self) -> tuple[int, int] | None:
        """The match nearest to where the text would stand, had only as many bytes changed as have come since."""
        if self._place is None or self._since < LEAST_NEAR_MATCH:
            return None
        expected, wanted = self._place + self._since, bytes(self._text[-LEAST_NEAR_MATCH:])
        last = min(len(self._text) - 1, expected + NEAR_BYTES)
        before = self._text.rfind(wanted, max(0, self._place - LEAST_NEAR_MATCH), min(last, expected))
        after = self._text.find(wanted, max(0, expected - LEAST_NEAR_MATCH), last)
        ends = [start + LEAST_NEAR_MATCH for start in (before, after) if start >= 0]
        return (min(ends, key=lambda place: abs(place - expected)), LEAST_NEAR_MATCH) if ends else None

    def _resumed(self) -> tuple[int, int] | None:
        """Behind as many characters as have come since a draft was wrong; the last may be thought to end as one before did."""
        if not self._resumes or self._place is None or not self._since or self._place >= self._end:
            return None
        place, came = self._place, self._since
        while place > 0 and is_within(self._text[place]):  # from the beginning of the character that was another
            place, came = place - 1, came + 1
        behind = bytes(self._text[len(self._text) - came :])
        ends = [start for start in range(came) if not is_within(behind[start])]
        if not ends or ends[0]:
            return None
        for start, end in itertools.pairwise((*ends, came)):
            begun, place = place, self._character_end(place)
            character, known = behind[start:end], bytes(self._text[begun:place])
            if len(character) < bytes_of_character(character[0]):
                ending = self._ending_of(known, character)
                if ending is None:
                    return None
                self._ending, self._began, self._came = ending, self._place, self._since
            elif character != known:
                self._stands_for[known] = character
        return (place, 0) if place < self._end else None

    def _character_end(self, place: int) -> int:
        place += 1
        while place < self._end and is_within(self._text[place]):
            place += 1
        return place

    def _ending_of(self, known: bytes, begun: bytes) -> bytes | None:
        """How a character ends that has begun in place of a known one: as it did before, or as the last that began so."""
        before = self._stands_for.get(known, b"")
        if not before.startswith(begun):
            start = self._text.rfind(begun, 0, len(self._text) - len(begun))
            before = b"" if start < 0 else bytes(self._text[start : start + bytes_of_character(begun[0])])
        return before[len(begun) :] or None

    def _end_character(self, byte: int) -> None:
        """A byte has come of the character that is thought to end in some way."""
        self._came += 1
        if self._ending[0] == byte:
            self._ending = self._ending[1:]
        else:
            self._place, self._since, self._right, self._ending = self._began, self._came, 0, b""

    def _index(self, data: bytes) -> None:
        """Append bytes, and note what each of them comes after."""
        start = len(self._text)
        self._text += data
        if not self._before:
            self._before.append(-1)
        for place in range(start + 1, len(self._text) + 1):
            if place < LEAST_MATCH:
                self._before.append(-1)
                continue
            key = bytes(self._text[place - LEAST_MATCH : place])
            self._before.append(self._newest.get(key, -1))
            self._newest[key] = place


def as_text(ids: Sequence[int], first_byte: int) -> bytes:
    """Ids as the bytes that drafts are made of; an id that is no byte is a zero, which at worst makes a wrong draft."""
    return bytes(value - first_byte if 0 <= value - first_byte < 256 else 0 for value in ids)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids, or bytes, two texts begin with alike."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(place for place in range(most) if one[place] != other[place])


def bytes_of_character(first: int) -> int:
    """How many bytes a character of UTF-8 has that begins with this one; 1 where none does."""
    return 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def is_within(byte: int) -> bool:
    """Is it a byte of UTF-8 that no character begins with?"""
    return byte & 0xC0 == 0x80
