"""Networks, prompts and keepers that tests of kept prompts share."""

import numpy as np
from small_networks import CONFIGS, CONTINUING, PACKABLE

from marlin_cli.engine.cache import CacheBits
from marlin_cli.models.megabyte_config import MegaByteConfig

# The byte at which a prompt stops being that of the state, beside those of equal length, longer and shorter.
PROMPT = bytes(np.random.default_rng(7).integers(0, 256, 72, dtype=np.uint8))
OTHERS = {
    "the same": PROMPT,
    "longer": PROMPT + b"and on",
    "longer by a patch": PROMPT + b"more",
    "shorter": PROMPT[:50],
    "shorter by patches": PROMPT[:48],
    "other in the middle": PROMPT[:37] + b"?" * 20,
    "other from the beginning": b"?" + PROMPT,
}

PACKED_BITS = (CacheBits(8, 8), CacheBits(4, 4), CacheBits(8, 4), CacheBits(16, 4))
SHIFTED = MegaByteConfig(**PACKABLE, token_shift=True)

# name -> (configuration, bits of the cache)
CASES = {
    **{name: (config, CacheBits()) for name, config in CONFIGS.items()},
    "bygpt5": (CONTINUING["bygpt5"], CacheBits()),
    **{
        f"{name}, {bits.keys} and {bits.values} bits": (config, bits)
        for name, config in (("megabyte", CONTINUING["megabyte"]), ("bygpt5", CONTINUING["bygpt5"]), ("shifted", SHIFTED))
        for bits in PACKED_BITS
    },
}


class Keeper:
    """Hands out the beginning of one state, and remembers what it is given."""

    keeps_outputs = False

    def __init__(self, state=None):
        self.state, self.beginning, self.kept = state, None, None

    def restore(self, ids):
        self.beginning = None if self.state is None else self.state.beginning_of(ids)
        return self.beginning

    def keep(self, state):
        self.kept = state
