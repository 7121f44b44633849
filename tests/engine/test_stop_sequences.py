"""Stop sequences and prefixes that are no bytes are refused, by the name of the argument."""

import pytest

from marlin_cli.engine.answer_requests import AnswerLimits
from marlin_cli.engine.stopping import Stopping
from marlin_cli.errors import UsageError


@pytest.mark.parametrize("given", ["ab", b"ab", ["ab"], [b"a", 3]])
@pytest.mark.parametrize("make", [lambda stop: Stopping(5, stop), lambda stop: AnswerLimits(5, stop=stop)])
def test_what_is_no_list_of_bytes_is_refused(make, given):
    with pytest.raises(UsageError, match="stop sequences are a list of bytes, found (str 'ab?'|int 97|int 3) in it"):
        make(tuple(given))


def test_a_prefix_is_bytes():
    with pytest.raises(UsageError, match=r"prefix is bytes, found str 'O '; call .encode\(\)"):
        AnswerLimits(prefix="O ")
    assert AnswerLimits(prefix=b"O ", stop=(b"\n",)).prefix == b"O "
