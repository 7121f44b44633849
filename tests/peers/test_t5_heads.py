"""The head of a T5 against the transformers that is installed: live for every combination, and what marlin exports."""

import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
from t5_heads import COMBINATIONS, GOLDEN, STORED, VERSIONS
from typer.testing import CliRunner

from marlin_cli import load
from marlin_cli.api import ByT5Model
from marlin_cli.cli import app
from marlin_cli.errors import AssumptionWarning
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.ops.device import choose_device

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")

from make_t5_heads import logits_of  # noqa: E402 (needs both)

pytestmark = pytest.mark.peers

SOURCE, TARGET = b"bytes", b"to"


@pytest.mark.parametrize("stored", STORED)
def test_the_same_logits_live(stored, tmp_path):
    """What make_t5_heads.py kept of this version, where it did, still holds."""
    kept = None
    if transformers.__version__ in VERSIONS:
        kept = json.loads((GOLDEN / f"{transformers.__version__}.json").read_text())
    for combination in (each for each in COMBINATIONS if each.stored == stored):
        theirs = logits_of(tmp_path, combination)  # writes the folder
        assert kept is None or (kept[combination.key] is None) == (theirs is None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AssumptionWarning)
            ours = np.array(load(tmp_path, device="cpu").logits(SOURCE, TARGET))
        assert np.abs(ours - theirs).max() < 1e-5, combination.key


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_what_is_exported(tied, scaled, tmp_path):
    """Decoded as it is loaded: T5's code there asks layers for their `weight`, which those that stay packed do not have."""
    pytest.importorskip("compressed_tensors")
    mx.random.seed(3)
    config = ByT5Config(
        vocab_size=384, d_model=64, heads=4, head_dim=16, ffn_dim=96, encoder_layers=2, decoder_layers=1,
        tied_head=tied, scaled_head=scaled,
    )  # fmt: skip
    network = ByT5(config)
    mx.eval(network.parameters())
    ByT5Model(network, choose_device("cpu")).save(tmp_path / "source")
    arguments = ["quantize", str(tmp_path / "source"), "--wo-bits", "4", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--export", "compressed-tensors"])
    assert result.exit_code == 0, result.output
    ours = np.array(load(tmp_path / "out", device="cpu").logits(SOURCE, TARGET))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the folder has such a table too
        model, info = transformers.T5ForConditionalGeneration.from_pretrained(
            tmp_path / "out", dtype=torch.float32, output_loading_info=True,
            quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
        )  # fmt: skip
    assert not info["missing_keys"] and not info["unexpected_keys"]
    source = torch.tensor([[*(byte + 3 for byte in SOURCE), 1]])
    target = torch.tensor([[0, *(byte + 3 for byte in TARGET)]])
    with torch.no_grad():
        theirs = model.eval()(input_ids=source, decoder_input_ids=target).logits[0].numpy()
    assert np.abs(ours - theirs).max() < 1e-4 * max(1.0, np.abs(theirs).max())


def test_the_tokenizer_of_an_export_ends_inputs_alike(tmp_path):
    from marlin_cli.checkpoints.t5_ends import tokenizer_config

    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(259)))
    assert transformers.ByT5Tokenizer.from_pretrained(tmp_path)("ab")["input_ids"] == [100, 101, 259]
