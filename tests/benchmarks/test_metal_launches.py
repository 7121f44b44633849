"""Launches on Metal, as kernels/README.md has them: a change that costs more of them shows here."""

import metal_launches as counted
import pytest

# A layer, and the rest, by operations: a byte within a patch, what ends a patch, a step of ByT5's decoder.
BY_OPERATIONS = {
    "16bit": ("16 a layer + 13", "18 a layer + 7", "22 a layer + 5"),
    "mxfp8": ("16 a layer + 13", "18 a layer + 7", "22 a layer + 5"),
    "nvfp4": ("30 a layer + 13", "32 a layer + 11", "38 a layer + 5"),
}
# The same of compiled graphs, but of a whole patch of 8 bytes. The global step has a product by MLX of the patch's embeddings.
COMPILED = {
    "16bit": ("32 a layer + 17", "5 a layer + 3", "8 a layer + 2"),
    "mxfp8": ("32 a layer + 17", "5 a layer + 3", "8 a layer + 2"),
    "nvfp4": ("32 a layer + 17", "5 a layer + 4", "8 a layer + 2"),
}


def counts(format, byte, step, answer):
    """`byte` of local layers, `step` of global ones and `answer` of a decoder's, a layer and the rest."""
    return (
        counted.linear_in_layers(lambda n: byte(counted.network_of(format, 1, n))),
        counted.linear_in_layers(lambda n: step(counted.network_of(format, n, 1))),
        counted.linear_in_layers(lambda n: answer(counted.byt5_of(format, n))),
    )


@pytest.mark.parametrize("format", COMPILED)
def test_compiled(format):
    patches = counted.of_patches
    found = counts(format, lambda n: patches(n)[0], lambda n: patches(n)[1], lambda n: counted.of_answers(n, True))
    assert found == COMPILED[format]


@pytest.mark.parametrize("format", BY_OPERATIONS)
def test_by_operations(format):
    steps = counted.of_operations
    found = counts(format, lambda n: steps(n)[0], lambda n: steps(n)[1], lambda n: counted.of_answers(n, False))
    assert found == BY_OPERATIONS[format]


def test_a_patch_is_built_in_a_fifth_of_the_time():
    """By a wide margin: it has been a tenth and less on a machine with other work."""
    network = counted.network_of("mxfp8", 2, 2)
    before, after = (counted.seconds(network, compiled, 5)[0] for compiled in (False, True))
    assert after < before / 5
