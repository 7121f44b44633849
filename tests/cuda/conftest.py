"""Makes the helpers beside these tests importable, and chooses what of the conformance tests is emulated where no GPU is."""

import sys
from pathlib import Path

import mlx.core as mx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

# An emulated kernel takes a second or two to compile: these always run, others with the slow tests.
QUICK = {
    "test_packed_linear[3-7-320-nvfp4-bfloat16]",
    "test_packed_linear[9-40-256-mxfp8-float16]",
    "test_many_rows[('affine', 8, 64)-bfloat16]",
    "test_every_whole_number_is_decoded[8-bfloat16]",
    "test_attention[grouped-bfloat16]",
    "test_attention[bias-float32]",
    "test_paged_attention[pages-(4, 8)-float32]",
    "test_paged_attention[one short page-(8, None)-float32]",
    "test_patch_embed[(3, 8)-64-ids0-float16]",
    "test_strided_pool[(3, 17, 33)-4-mean-bfloat16]",
}
EMULATED = ("test_packed_linear", "test_many_rows", "whole_number")  # in 16 bits too


def pytest_collection_modifyitems(items):
    if mx.cuda.is_available():
        return
    for item in items:
        if item.path.name == "test_conformance.py" and item.name not in QUICK:
            item.add_marker(pytest.mark.slow)
            types = getattr(item, "callspec", None) and item.callspec.params
            if types and types.get("dtype", mx.float32) != mx.float32 and not any(name in item.name for name in EMULATED):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here; of 16-bit types few are emulated"))
