"""What ranks tell each other of streams, as bytes: frozen dataclasses of known classes and the plain values in them.

A rank reads what another wrote, and builds nothing that is not of these classes.
"""

import base64
import binascii
import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from marlin_cli.documents import parse_json
from marlin_cli.errors import DistributedError, MarlinError
from marlin_cli.text import one_line


class Wire:
    """Values to bytes and back.

    Args:
        classes: the dataclasses that may come, each with its own fields.
    """

    def __init__(self, classes: Iterable[type]) -> None:
        self._classes = {each.__name__: each for each in classes}

    def to_bytes(self, value: Any) -> bytes:
        """A dataclass of these classes, bytes, a text, a number, True, False or None; or a list or tuple of such."""
        return json.dumps(self._plain(value)).encode()

    def from_bytes(self, data: bytes) -> Any:
        """What `to_bytes` was given; lists come back as tuples.

        Raises:
            DistributedError: it was made of something else.
        """
        document = parse_json(data, "a message of a rank", DistributedError)
        try:
            return self._value(document)
        except (TypeError, ValueError, KeyError, binascii.Error, MarlinError) as error:
            raise DistributedError(f"a rank said what is unknown here ({one_line(error)}); start all of one version") from None

    def _plain(self, value: Any) -> Any:
        if isinstance(value, bytes):
            return {"bytes": base64.b64encode(value).decode("ascii")}
        if isinstance(value, list | tuple):
            return [self._plain(each) for each in value]
        if dataclasses.is_dataclass(value):
            name = type(value).__name__
            assert self._classes.get(name) is type(value), f"{name} does not travel between ranks"
            fields = {field.name: self._plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return {"class": name, "fields": fields}
        return value

    def _value(self, plain: Any) -> Any:
        if isinstance(plain, list):
            return tuple(self._value(each) for each in plain)
        if not isinstance(plain, dict):
            return plain
        if "bytes" in plain:
            return base64.b64decode(plain["bytes"], validate=True)
        return self._classes[plain["class"]](**{name: self._value(value) for name, value in plain["fields"].items()})
