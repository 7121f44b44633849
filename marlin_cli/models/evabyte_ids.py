"""EvaByte's ids: byte b is b + 64, below stand marks, of which some have names; and the form of its chats."""

import re
from collections.abc import Sequence

import numpy as np

FIRST_BYTE = 64
START, END, END_OF_TURN = 1, 2, 11

# Texts that stand for marks, as its tokenizer has them.
NAMES = {
    **{mark: f"<extra_id_{mark}>" for mark in range(5, FIRST_BYTE)},
    0: "<pad>", 1: "<bos>", 2: "<eos>", 3: "<unk>", 4: "<sep>", 5: "<repo_name>", 6: "<file_sep>", 7: "<t2v_token>",
    8: "<v2t_token>", 9: "<|start_header_id|>", 10: "<|end_header_id|>", 11: "<|eot_id|>",
}  # fmt: skip

_MARKS = {name.encode(): mark for mark, name in NAMES.items()}
_ANY_MARK = re.compile(b"|".join(re.escape(name) for name in sorted(_MARKS)))


def ids_of_bytes(data: bytes) -> list[int]:
    """An id a byte."""
    return [int(value) for value in np.frombuffer(data, dtype=np.uint8).astype(np.int64) + FIRST_BYTE]


def ids_with_marks(data: bytes) -> list[int]:
    """As `ids_of_bytes`, but names of marks are one id each; that of the beginning, which leads anyway, is none there."""
    found, end = [], 0
    for match in _ANY_MARK.finditer(data):
        mark = _MARKS[match[0]]
        found += ids_of_bytes(data[end : match.start()])
        if mark != START or match.start():
            found.append(mark)
        end = match.end()
    return found + ids_of_bytes(data[end:])


def bytes_of_mark(mark: int) -> bytes:
    """The name of a mark; nothing where it has none."""
    return NAMES.get(mark, "").encode()


def chat(turns: Sequence[tuple[str, bytes]], system: bytes = b"") -> bytes:
    """A chat as the tuned model was shown it, with names of marks, up to where its answer begins.

    Args:
        turns: (user or assistant, what was said), in order.
        system: what is said before; it was trained with nothing.
    """
    said = [("system", system), *turns]
    text = b"".join(b"<|start_header_id|>%b<|end_header_id|>\n\n%b<|eot_id|>" % (role.encode(), data) for role, data in said)
    return text + b"<|start_header_id|>assistant<|end_header_id|>\n\n"
