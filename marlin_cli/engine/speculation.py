"""Speculation: how far a stream is drafted ahead, and what came of it. Drafts and passes come from elsewhere.

A byte of a draft is accepted if the model's own draw gives it: from the same logits, with the stream's own noise of that byte.
So the bytes of a stream are the same whatever was drafted, as far as a row does not depend on those beside it
(`MARLIN_ROWS=exact`); without that there is no speculation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from marlin_cli.engine.drafts import DraftSource, as_text, common_length
from marlin_cli.errors import UsageError
from marlin_cli.text import quoted

# Units (patches, or ids of a model that takes them one by one) that are drafted at once at most, unless a number is given.
MOST_UNITS = 32


@dataclass(frozen=True)
class Speculation:
    """How a stream is drafted ahead. The bytes are the same with any of these settings.

    Raises:
        UsageError: a number below 0.
    """

    most: int = 0  # units drafted at once at most; 0: none
    adapts: bool = False  # as many as pay, which may be none; and none where a model or device cannot verify them
    prediction: bytes = b""  # what may follow, such as the text before an edit

    def __post_init__(self) -> None:
        if self.most < 0:
            raise UsageError(f"a draft has 0 patches or more, found {self.most}")


# Of a draft that is asked for by number: more rows at once are no faster to verify than one after the other.
MOST_ASKED_UNITS = 256

OFF = Speculation()
AUTO = Speculation(MOST_UNITS, adapts=True)

# Why drafts are not verified where a row is not the same bits beside others.
ROWS_DEPEND = "a row of a product depends on the rows beside it here; set MARLIN_ROWS=exact"

# Nor where a row chooses what it reads by bounds of a page, which would know of drafted rows behind it.
NOT_BY_BOUNDS = "--sparse reads pages by bounds of their keys, and drafted keys would move these"


def speculation_of(asked: str | int, prediction: bytes = b"") -> Speculation:
    """What `auto`, `off` or a number asks for.

    Raises:
        UsageError: something else.
    """
    if asked == "auto":
        return Speculation(MOST_UNITS, True, prediction)
    if asked == "off":
        return Speculation(prediction=prediction)
    if isinstance(asked, int) or (asked.isdecimal() and len(asked) < 10):
        if 1 <= int(asked) <= MOST_ASKED_UNITS:
            return Speculation(int(asked), False, prediction)
    raise UsageError(f"--speculate is auto, off or a number from 1 to {MOST_ASKED_UNITS} of patches, found {quoted(asked)}")


def check_verified(speculation: Speculation, why_not: str | None) -> None:
    """See that what is asked for can be done, where it is asked for in any case.

    Args:
        why_not: the reason why drafts are not verified here, if they are not.

    Raises:
        UsageError: it cannot.
    """
    if speculation.most and not speculation.adapts and why_not is not None:
        raise UsageError(f"--speculate: {why_not}; leave it off, or ask for auto")


@dataclass(frozen=True)
class Speculated:
    """What came of the drafts of a stream."""

    drafted_bytes: int
    accepted_bytes: int
    passes: int  # of the model's largest part, with drafts or without


# What a unit that was seen counts beside the next one; and of those that a model itself guesses, at every id.
MEMORY, MEMORY_OF_OWN = 0.9, 0.97


@dataclass
class _Odds:
    """How many units were right of those that were guessed one after the other, with as much to speak for them."""

    right: float
    tried: float
    memory: float = MEMORY

    @property
    def chance(self) -> float:
        return self.right / self.tried

    def saw(self, right: int, units: int) -> None:
        """Of units that were guessed, so many came, one after the other."""
        for number in range(min(units, right + 1)):
            self.right, self.tried = self.memory * self.right + (number < right), self.memory * self.tried + 1.0


class _OwnGuesses:
    """What a model itself guesses of the ids to come: as many of them are drafted as pay by how often each place was right."""

    def __init__(self) -> None:
        self._odds: list[_Odds] = []  # by place, where those before it were right
        self._guess: list[int] = []
        self._tried = self._passes_without = 0

    def is_wanted(self, cost: Callable[[int], float]) -> bool:
        """See `Drafting.wants_guess`."""
        self._passes_without += 1
        pays = not self._odds or worth_of([each.chance for each in self._odds], cost) > 0
        return pays or self._passes_without > PASSES_WITHOUT

    def draft(self, guess: Sequence[int], most: int, cost: Callable[[int], float] | None) -> list[int]:
        """As many of the ids as pay, `most` of them at most; where no cost is told those."""
        self._guess = list(guess)
        if guess:
            self._passes_without = 0
        self._odds += [_Odds(1.0, 2.0, MEMORY_OF_OWN) for _ in range(len(guess) - len(self._odds))]
        if cost is not None:
            most = min(most, worth_of([each.chance for each in self._odds[: len(guess)]], cost))
        self._tried = most
        return self._guess[:most]

    def push(self, ids: Sequence[int]) -> tuple[int, int]:
        """These ids have come: how many were drafted, and how many of them were right."""
        seen, right = min(len(self._guess), len(ids)), common_length(self._guess, list(ids))
        for place in range(min(seen, right + 1)):
            self._odds[place].saw(int(place < right), 1)
        tried, self._guess, self._tried = self._tried, [], 0
        return tried, min(right, tried)


# Passes without drafts, where these cost something and did not pay, until one is drafted all the same.
PASSES_WITHOUT = 32


class Drafting:
    """The drafts of one stream: how long they are, and what has come of them.

    What comes of a draft is seen in the ids that come next, whether it was tried or only thought of: so a draft that has
    become right is known without trying.

    Args:
        source: of the drafts, which knows the prompt.
        first_byte: id of byte 0.
    """

    def __init__(self, settings: Speculation, source: DraftSource, first_byte: int) -> None:
        self._settings, self._source, self._first_byte = settings, source, first_byte
        # By how many bytes speak for a draft: fewer than 4, than 16, than 32, or more. Only those are trusted unseen.
        self._odds = [_Odds(0.4, 2.0), _Odds(0.4, 2.0), _Odds(0.4, 2.0), _Odds(1.4, 2.0)]
        self._guess, self._odds_now = b"", self._odds[3]
        self._unit, self._given, self._tried = 1, 0, 0
        self._drafted = self._accepted = self._passes = self._passes_without = 0
        self._own = _OwnGuesses()

    @property
    def told(self) -> Speculated:
        """What has come of all drafts so far."""
        return Speculated(self._drafted, self._accepted, self._passes)

    @property
    def is_expected(self) -> bool:
        """Are drafts likely, as a number of them is asked for or what may follow is given?"""
        return not self._settings.adapts or bool(self._settings.prediction)

    def push(self, ids: Sequence[int]) -> None:
        """The stream goes on with ids, which a pass has given."""
        data = as_text([value for value in ids if value >= 0], self._first_byte)
        right = common_length(self._guess, data)
        units = (self._given + min(len(self._guess), len(data))) // self._unit
        self._odds_now.saw((self._given + right) // self._unit, units)
        self._passes, self._drafted = self._passes + 1, self._drafted + self._tried
        self._accepted += min(right, self._tried)
        self._guess, self._tried = b"", 0
        drafted, accepted = self._own.push(ids)
        self._drafted, self._accepted = self._drafted + drafted, self._accepted + accepted
        self._source.push(data)

    def wants_guess(self, prices: "Prices") -> bool:
        """Is it of use to know what the model itself guesses? Now and then it is, to see."""
        return not self._settings.adapts or self._own.is_wanted(prices.cost)

    def draft(self, unit: int, given: int, most: int, prices: "Prices", guess: Sequence[int] = ()) -> list[int]:
        """Ids that may come next: as many as, with `given` ids, are whole units; or none.

        Args:
            unit: ids of a unit.
            given: ids that stand in the first of them.
            most: ids that may come at most.
            prices: what units cost that are drafted.
            guess: what the model itself guesses, ids that are units; of use where the source has nothing that pays.
        """
        found = self._out_of_source(unit, given, most, prices)
        most = 0 if found else min(self._settings.most, most, len(guess))
        return self._own.draft(guess, most, prices.cost if self._settings.adapts else None) or found

    def _out_of_source(self, unit: int, given: int, most: int, prices: "Prices") -> list[int]:
        units = min(self._settings.most, (given + most) // unit)
        if self._settings.adapts and not self._source.is_free:
            # Nothing is seen of what is not drafted: now and then a unit is, whatever it costs.
            self._passes_without += 1
            units = min(units, worth(self._odds_now.chance, prices.price) or self._passes_without // PASSES_WITHOUT)
        found = self._source.draft(units * unit - given) if units else None
        if found is None:
            return []
        self._passes_without = 0
        self._guess, self._unit, self._given = found.data, unit, given
        self._odds_now = self._odds[0 if found.match < 4 else 1 if found.match < 16 else 2 if found.match < 32 else 3]
        units = (given + len(found.data)) // unit
        if self._settings.adapts and self._source.is_free:
            chance = self._odds_now.chance
            most = worth_of(found.chances, prices.cost) if found.chances else worth(chance, prices.price)
            units = min(units, most)
        self._tried = max(0, units * unit - given)
        return [byte + self._first_byte for byte in found.data[: self._tried]]


# How much likelier than its price a draft has to be before one is tried: a chance is guessed from few units.
MARGIN = 1.5


def worth(chance: float, price: float) -> int:
    """Units that are worth their price, if each is right with this chance where all before it are."""
    if chance < MARGIN * price:
        return 0
    return MOST_UNITS if chance >= 1.0 else max(1, int(math.log(max(price, 1e-6)) / math.log(chance)))


# Chances of single ids are guessed from few, and what they depend on is not known: they are trusted by so much.
TRUST = 0.97


def worth_of(chances: Sequence[float], cost: Callable[[int], float]) -> int:
    """Units with which a pass gives most for what it costs, if each is right with a chance of its own where all before it are.

    Args:
        cost: of so many drafted units together, where one costs 1 that is not drafted.
    """
    best, most, right, expected = 0, 1.0, 1.0, 1.0
    for units, chance in enumerate(chances, 1):
        right *= TRUST * chance
        expected += right
        gives = expected / (1.0 + cost(units))
        if gives > most:
            best, most = units, gives
    return best


# A guess at what a drafted unit costs, before any was verified; and how fast it is believed again when none is.
FIRST_PRICE, FORGETTING = 0.4, 0.01


class Prices:
    """What a drafted unit costs beside one that is not, by the clock of the processor, which other programs do not move.

    Each is a moving mean of the seconds of a unit of a stream. A price holds for the streams that are there: the more there
    are, the less a unit costs that is not drafted, until drafts do not pay.
    """

    # A step that was interrupted counts as no more than this many of the usual ones.
    MOST_TIMES = 3.0

    def __init__(self) -> None:
        self._plain = self._reading = 0.0
        self._price = FIRST_PRICE
        self._costs: dict[int, float] = {}  # of so many drafted units of a stream together, as far as it has been seen

    @property
    def price(self) -> float:
        """Of a drafted unit, in those that are not."""
        return self._price

    def cost(self, units: int) -> float:
        """Of so many drafted units together: as it was seen, or as fewer were and more at the mean price."""
        if units in self._costs:
            return self._costs[units]
        fewer = max((seen for seen in self._costs if seen < units), default=0)
        return self._costs.get(fewer, 0.0) + (units - fewer) * self._price

    def plain(self, reading: float, writing: float, streams: int) -> None:
        """A pass without drafts took so many seconds for units of so many streams."""
        self._plain = self._moved(self._plain, (reading + writing) / streams)
        self._reading = self._moved(self._reading, reading / streams)
        # What was once too dear may be so no more, with other streams beside it.
        self._price += FORGETTING * (FIRST_PRICE - self._price)

    def drafted(self, reading: float, verifying: float, streams: int, units: int) -> None:
        """A pass of so many streams in which so many units in all were drafted took so many seconds, writing left out."""
        if self._plain:
            more = max(0.0, reading - streams * self._reading)
            cost, each = (more + verifying) / self._plain, max(1, round(units / streams))
            self._price = self._moved(self._price, cost / units)
            self._costs[each] = self._moved(self._costs.get(each, self.cost(each)), each * cost / units)

    def _moved(self, mean: float, seen: float) -> float:
        return seen if not mean else mean + 0.2 * (min(seen, self.MOST_TIMES * mean) - mean)
