"""What numbers of a configuration may be: from least to most, checked before anything is built of them."""

from collections.abc import Mapping
from typing import Any

from marlin_cli.errors import ConfigError
from marlin_cli.text import quoted

# By the name of a field: the least and the most, both allowed. Beyond them is damage or malice, no model.
Limits = Mapping[str, tuple[float, float]]


def check_limits(config: Any, limits: Limits) -> None:
    """See that the fields of a configuration lie within `limits`; those that say None are not looked at.

    Raises:
        ConfigError: one that does not, NaN among them.
    """
    for name, (least, most) in limits.items():
        value = getattr(config, name)
        if value is None or least <= value <= most:
            continue
        if value > most:
            raise ConfigError(f"{name} is {_shown(value)}, more than the {_shown(most)} that marlin takes for real")
        raise ConfigError(f"{name} must be at least {_shown(least)}, found {_shown(value)}")


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and value.bit_length() <= 64 else quoted(value)
