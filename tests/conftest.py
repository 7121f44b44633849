"""Fixtures of all tests: small random networks, the shipped demo, a browser."""

import os
import sys
from pathlib import Path

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # products on an NVIDIA GPU to float32's precision; read at the first of them

import mlx.core as mx  # noqa: E402
import pytest  # noqa: E402

from marlin_cli import MegaByteModel  # noqa: E402

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "benchmarks")]

import page_reader  # noqa: E402 (found by the line above)
from small_networks import ANSWERING, CONFIGS, CONTINUING, ENCODING, FIRST_DEMO, SMALL, random_weights  # noqa: E402 (the same)


@pytest.fixture(autouse=True)
def rows_as_they_were():
    """A command may have the kernels keep rows apart in its process, which is not for the tests behind it."""
    before = os.environ.get("MARLIN_ROWS")
    yield
    if before is None:
        os.environ.pop("MARLIN_ROWS", None)
    else:
        os.environ["MARLIN_ROWS"] = before


@pytest.fixture
def small_sizes():
    return dict(SMALL)


@pytest.fixture
def random_network():
    return random_weights


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def each_config(request):
    return request.param


@pytest.fixture
def each_network(each_config):
    return random_weights(each_config)


@pytest.fixture(params=CONTINUING.values(), ids=CONTINUING.keys())
def each_continuing(request):
    return random_weights(request.param)


@pytest.fixture(params=ANSWERING.values(), ids=ANSWERING.keys())
def each_answering(request):
    return random_weights(request.param)


@pytest.fixture(params=ENCODING.values(), ids=ENCODING.keys())
def each_encoding(request):
    return random_weights(request.param)


@pytest.fixture(params={**CONTINUING, **ANSWERING}.values(), ids={**CONTINUING, **ANSWERING}.keys())
def each_tiny(request):
    return random_weights(request.param)


@pytest.fixture(scope="session")
def demo():
    return MegaByteModel.from_pretrained("megabyte-demo", dtype=mx.float32)  # a GPU would take the 16 bits that are stored


@pytest.fixture(scope="session")
def first_demo():
    """The demo that marlin shipped until November 2026: smaller, with patches of 8 bytes, stored in bfloat16."""
    return MegaByteModel.from_pretrained(FIRST_DEMO, dtype=mx.float32)


@pytest.fixture(scope="session")
def read_page():
    """A function of a page's HTML: its elements, see `page_reader.PageReader`."""
    return page_reader.PageReader


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A function of a page's path: the page as headless Chromium understood it, as HTML."""
    if page_reader.chromium() is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    profile = tmp_path_factory.mktemp("chromium")
    return lambda path: page_reader.loaded(path, profile)
