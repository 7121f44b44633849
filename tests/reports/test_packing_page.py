"""What the page of `marlin quantize --report` says of domains, from losses written by hand."""

import numpy as np
import pytest

from marlin_cli.page import Grid, Text
from marlin_cli.quality.packing_loss import DomainLoss
from marlin_cli.quantization.formats import FORMATS
from marlin_cli.quantization.layers import LayerReport
from marlin_cli.quantization.plan import LayerPlan
from marlin_cli.reports.packing_page import document_of, sections_of
from marlin_cli.statistics.show import Summary

LAYER = LayerReport(LayerPlan("local.up", "local", 32, 32, FORMATS["nvfp4"], 16), 2048, 576, 1024.0, 10.24, 20.48)
# Bits per byte lost: 0.1 on average where it was calibrated, 0.3 where not.
LOSSES = {
    "binary": DomainLoss(400.0, 410.0, np.array([0.0, 0.2]), np.full(100, 0.1, np.float32)),
    "code": DomainLoss(200.0, 230.0, np.array([0.3]), np.full(100, 0.3, np.float32)),
}


def page(domains, domain_weights=None):
    summary = None if domains is None else Summary("m" * 64, sum(domains.values()), domains, [], [], [])
    document = document_of("model", "out", "gptq", [LAYER], {}, summary, None, LOSSES, domain_weights)
    (section,) = [each for each in sections_of(document, None) if each.title == "Error by domain"]
    texts = [block.text for block in section.blocks if isinstance(block, Text)]
    (grid,) = [block for block in section.blocks if isinstance(block, Grid)]
    return document, texts, grid


def test_each_domain_shows_its_loss_and_the_error_of_paired_windows():
    document, _, grid = page(None)
    assert document["domains"]["binary"]["bits_per_byte_lost_error"] == pytest.approx(0.1)
    assert document["domains"]["code"]["bits_per_byte_lost_error"] is None  # a single window
    assert [row[grid.columns.index("difference")] for row in grid.rows] == ["+0.1000 ± 0.1000", "+0.3000"]


@pytest.mark.parametrize(
    ("domains", "domain_weights", "calibrated_on", "unseen"),
    [
        ({"binary": 30, "code": 10}, None, {"binary": 0.75, "code": 0.25}, None),
        ({"binary": 30, "code": 10}, {"binary": 2.0, "code": 0.0}, {"binary": 1.0}, "Calibrated on binary alone: no code"),
        ({"binary": 30}, None, {"binary": 1.0}, "Calibrated on binary alone: no code"),
        ({"other": 30}, None, {"other": 1.0}, "Calibrated on other alone: no binary and no code"),
        (None, None, None, None),
    ],
)
def test_domains_that_calibration_did_not_weigh_are_named(domains, domain_weights, calibrated_on, unseen):
    document, texts, _ = page(domains, domain_weights)
    assert document["calibrated_on"] == calibrated_on
    assert len(texts) == (unseen is not None) and all(text.startswith(unseen) for text in texts)
