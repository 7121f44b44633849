"""Bytes as text that never breaks a character: what is unfinished waits for its rest, what is no UTF-8 becomes U+FFFD."""

import codecs


class Characters:
    """Bytes in, whole characters out; at most 3 bytes are held back.

    Attributes:
        count: characters that went out so far.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.count = 0

    def push(self, data: bytes, *, final: bool = False) -> str:
        """The characters that are whole after `data`; with `final` all that are left."""
        text = self._decoder.decode(data, final)
        self.count += len(text)
        return text
