"""The pages of `marlin quantize` and `marlin bench`, read back by a parser and by a browser."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from small_networks import FIRST_DEMO

from marlin_cli import load
from marlin_cli.api import MegaByteModel
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops.device import choose_device
from marlin_cli.statistics import load_statistics

# The command line, but for the bytes that a packed model is compared on: a machine without a compiler would need minutes.
FEWER_BYTES = """
from marlin_cli.cli import main
from marlin_cli.commands import packing_report
packing_report.COMPARED_BYTES, packing_report.WINDOW_BYTES = 6 << 10, 1 << 10
main()
"""
MARLIN = [sys.executable, "-c", FEWER_BYTES]


def run(*arguments, code=0):
    result = subprocess.run([*MARLIN, *map(str, arguments)], capture_output=True, text=True, timeout=600)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed demo, the page that tells what it cost, and the statistics."""
    folder = tmp_path_factory.mktemp("packed")
    statistics = folder / "statistics.safetensors"
    run("calibrate", FIRST_DEMO, "-o", statistics, "--max-bytes", "6k", "--seq-bytes", "1k", "--hessian")
    report = ["--stats", statistics, "--method", "rtn", "--report", folder / "page.html", "--json"]
    printed = json.loads(run("quantize", FIRST_DEMO, "-o", folder / "model", *report).stdout)
    return folder, printed, statistics


def test_the_page_of_quantize_agrees_with_what_was_printed(packed, read_page):
    folder, printed, statistics_file = packed
    page = read_page((folder / "page.html").read_text())
    assert page.faults == []
    document = page.data
    assert document["parts"] == printed["parts"] and document["kept_bytes"] == printed["kept_bytes"]
    assert document["worst_layers"] == [layer["path"] for layer in printed["worst_layers"]]
    for part in document["parts"]:
        layers = [each for each in document["layers"] if each["part"] == part["part"]]
        assert sum(each["bytes_after"] for each in layers) == part["bytes_after"]
    statistics = load_statistics(statistics_file)
    layer = next(each for each in document["layers"] if each["path"] == "local.layers.0.ffn.down_proj")
    assert set(layer["output_error_by_domain"]) == set(statistics.domains)
    # The error over all bytes lies between those of the domains.
    errors = layer["output_error_by_domain"].values()
    assert min(errors) <= layer["output_error"] <= max(errors)
    shown = next(each for each in document["statistics"]["layers"] if "local.layers.0.ffn.down_proj" in each["layers"])
    largest = statistics.totals.inputs["local.layers.0.ffn.down_proj"].absolute_maximum.max(axis=(0, 2))
    assert shown["input"]["maximum_by_group"] == pytest.approx(largest.tolist())


def test_the_divergences_are_those_of_the_two_models(packed, read_page):
    folder, _, _ = packed
    document = read_page((folder / "page.html").read_text()).data
    assert set(document["domains"]) == {"binary", "code", "multilingual"}
    for domain in document["domains"].values():
        assert sum(domain["kl_counts"]) == domain["bytes"] > 1_000
        edges = document["kl_edges_bits"]
        below = np.cumsum(domain["kl_counts"]) / domain["bytes"]
        median_bin = int(np.searchsorted(below, 0.5))
        assert edges[median_bin] <= domain["kl_median_bits"] <= edges[median_bin + 1]
        assert 0 < domain["kl_mean_bits"] < 0.1
        assert domain["bits_per_byte_after"] == pytest.approx(domain["bits_per_byte_before"], abs=0.05)
    # Once more, the long way, on a few bytes: the packed model differs as much as the page says.
    data = b"def main():\n    return 0\n" * 20
    before, after = (np.array(load(each).logits(data), dtype=np.float64) for each in (FIRST_DEMO, folder / "model"))
    before, after = (each - np.logaddexp.reduce(each, axis=-1, keepdims=True) for each in (before, after))
    divergence = (np.exp(before) * (before - after)).sum(axis=-1).mean() / math.log(2)
    assert 0.1 < divergence / document["domains"]["code"]["kl_mean_bits"] < 10


def test_a_browser_reads_the_figures_of_quantize(packed, browser, read_page):
    folder, printed, _ = packed
    page = read_page(browser(folder / "page.html"))
    assert page.data["parts"] == printed["parts"]
    headings = page.texts("h2")
    for words in ("Size and error by part", "Size and error by layer", "The ten worst layers", "Error by domain",
                  "KL divergence of the packed model from the 16-bit model", "Activation ranges by byte position"):  # fmt: skip
        assert words in headings
    after = sum(part["bytes_after"] for part in printed["parts"]) + printed["kept_bytes"]
    assert f"{after:,}" in page.texts("td")
    # A column of the histogram for each range that has bytes, in each domain.
    counts = [count for domain in page.data["domains"].values() for count in domain["kl_counts"] if count]
    assert len([title for title in page.texts("title") if " .. " in title and not title.endswith(": 0")]) == len(counts)


def test_a_page_without_statistics_says_less(tmp_path, read_page, random_network, small_sizes):
    config = MegaByteConfig(**{**small_sizes, "local_dim": 32, "global_heads": 1})
    MegaByteModel(random_network(config), choose_device("cpu")).save(tmp_path / "small")
    run("quantize", tmp_path / "small", "-o", tmp_path / "model", "--report", tmp_path / "page.html")
    page = read_page((tmp_path / "page.html").read_text())
    assert page.faults == []
    assert page.data["statistics"] is None and len(page.data["worst_layers"]) == 10
    assert "Activation ranges by byte position" not in page.texts("h2")
    assert any("calibrate --hessian" in text for text in page.texts("p"))


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--dry-run"], 2, "beside --dry-run; leave one out"),
        (["-o", "x", "--dequantize"], 2, "beside --dequantize; leave one out"),
        (["-o", "model", "--report", "no/where.html"], 1, "the folder no does not exist"),
        (["-o", "model", "--report", "."], 1, "is a folder"),
    ],
)
def test_what_cannot_be_reported_is_said_before_packing(arguments, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = [] if "--report" in arguments else ["--report", "page.html"]
    assert words in run("quantize", "megabyte-demo", *arguments, *report, code=code).stderr
    assert not list(tmp_path.iterdir())


def test_the_page_and_the_picture_of_bench(packed, browser, read_page, tmp_path):
    pytest.importorskip("matplotlib")
    folder, _, _ = packed
    measured = ["--prompt-bytes", "64", "--decode-bytes", "16", "--repeats", "2", "--device", "cpu"]
    scored = ["--quality", "default", "--max-quality-bytes", "6k", "--window-bytes", "1k", "--reference", FIRST_DEMO]
    files = ["--report", tmp_path / "page.html", "--plot", tmp_path / "plot.svg"]
    printed = json.loads(run("bench", FIRST_DEMO, folder / "model", *measured, *scored, *files, "--format", "json").stdout)
    page = read_page(browser(tmp_path / "page.html"))
    assert page.data == printed
    decode = printed["models"][1]["throughput"]["decode_bytes_per_second"]["median"]
    assert f"model: {decode:.6g} bytes/s" in page.texts("title")
    bits = [8 * sum(each["stored_weight_bytes"].values()) / sum(each["weights"].values()) for each in printed["models"]]
    assert bits == pytest.approx([16, 4.95], abs=0.02)
    assert any(f"bits per weight, all weights {bits[1]:.6g}" in title for title in page.texts("title"))
    assert "<svg" in (tmp_path / "plot.svg").read_text()


@pytest.mark.slow
def test_the_page_shows_what_calibrating_on_the_wrong_domain_costs(tmp_path, read_page):
    def marlin(*arguments):
        subprocess.run([sys.executable, "-m", "marlin_cli", *map(str, arguments)], check=True, capture_output=True)

    statistics = tmp_path / "statistics.safetensors"
    marlin("calibrate", FIRST_DEMO, "-o", statistics, "--max-bytes", "256k", "--seq-bytes", "2k", "--hessian")
    documents = {}
    for name, weights in {"all": [], "binary": ["--domain-weight", "binary=1"]}.items():
        how = ["--global-bits", 4, "--local-bits", 4, "--method", "gptq", "--stats", statistics, *weights]
        marlin("quantize", FIRST_DEMO, "-o", tmp_path / name, *how, "--report", tmp_path / f"{name}.html")
        page = read_page((tmp_path / f"{name}.html").read_text())
        documents[name] = page.data
        alone = any(text.startswith("Calibrated on binary alone: no code and no multilingual") for text in page.texts("p"))
        assert alone == (name == "binary")

    def lost(name: str, domain: str) -> float:
        found = documents[name]["domains"][domain]
        return found["bits_per_byte_after"] - found["bits_per_byte_before"]

    for domain in ("code", "multilingual"):
        assert lost("binary", domain) > 1.1 * lost("all", domain) > 0
