"""The formats of packed weights: their names, widths, groups and scales. MLX defines their bytes."""

from dataclasses import dataclass

from marlin_cli.errors import QuantizationError


@dataclass(frozen=True)
class Format:
    """A packed format. `group_sizes` are in order of preference; weights of a group share a scale."""

    name: str
    mode: str  # MLX's name of the kind
    bits: int
    group_sizes: tuple[int, ...]
    group_overhead_bits: int  # scale, and bias where there is one
    layer_bytes: int = 0  # of what a layer has beside its groups

    def bits_per_weight(self, group_size: int) -> float:
        """Bits of a weight with its share of the scale."""
        return self.bits + self.group_overhead_bits / group_size

    def bytes_of(self, weights: int, group_size: int) -> int:
        """Bytes of a layer of so many weights."""
        return round(weights * self.bits_per_weight(group_size) / 8) + self.layer_bytes

    def group_size_for(self, columns: int) -> int | None:
        """The preferred group that divides `columns`, or None."""
        return next((size for size in self.group_sizes if columns % size == 0), None)


FORMATS: dict[str, Format] = {
    "nvfp4": Format("nvfp4", "nvfp4", 4, (16,), 8, 4),  # E2M1 under an E4M3 scale, and a float32 scale of all
    "mxfp4": Format("mxfp4", "mxfp4", 4, (32,), 8),  # E2M1 under an E8M0 scale
    "mxfp8": Format("mxfp8", "mxfp8", 8, (32,), 8),  # E4M3 under an E8M0 scale
    "int4": Format("int4", "affine", 4, (64, 32, 128), 32),  # 16-bit scale and bias
    "int8": Format("int8", "affine", 8, (64, 32, 128), 32),
}


def default_format(bits: int) -> Format:
    """The format that a bit width means when none is named: nvfp4 for 4, mxfp8 for 8."""
    return FORMATS["nvfp4" if bits == 4 else "mxfp8"]


def format_of(mode: str, bits: int) -> Format:
    """The format with MLX's name of the kind and this width.

    Raises:
        QuantizationError: marlin has no such format.
    """
    found = next((each for each in FORMATS.values() if (each.mode, each.bits) == (mode, bits)), None)
    if found is None:
        raise QuantizationError(f"{bits}-bit {mode} is not a format of marlin; known: {', '.join(FORMATS)}")
    return found
