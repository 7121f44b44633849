"""GGUF against the `gguf` package: its writer, its names of tensors and its packed types, on a ByT5 of transformers."""

import contextlib
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli import load
from marlin_cli.errors import AssumptionWarning, CheckpointError

gguf = pytest.importorskip("gguf", reason="needs the extra `peers`")
torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")

pytestmark = pytest.mark.peers

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
SHAPE = {"vocab_size": 384, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
MODELS = {
    "gated, untied": SHAPE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0},
    "relu, tied": SHAPE | {"feed_forward_proj": "relu", "tie_word_embeddings": True, "decoder_start_token_id": 259},
    "relu, tied, its head stored again": SHAPE
    | {"feed_forward_proj": "relu", "tie_word_embeddings": True, "decoder_start_token_id": 0},
    "gated, tied by transformers 5": SHAPE
    | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0},
}  # fmt: skip
SOURCE = b"Some bytes to read: \xc3\xa9"
TARGET = b"and some to write"


def make(name: str):
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**MODELS[name])).eval()
    with torch.no_grad():
        if name == "gated, untied":
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 0.1)
        for key, parameter in model.named_parameters():
            if "relative_attention" in key:
                parameter.normal_(0, 1)
    return model


def write(model, path: Path, kind: str, *, head: bool) -> dict[str, np.ndarray]:
    """What llama.cpp's converter does, by the package alone; the tensors as they read back, by transformers' names."""
    config = model.config
    writer = gguf.GGUFWriter(path, "t5")
    writer.add_context_length(512)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.num_layers)
    writer.add_decoder_block_count(config.num_decoder_layers)
    writer.add_head_count(config.num_heads)
    writer.add_key_length(config.d_kv)
    writer.add_value_length(config.d_kv)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_relative_attn_buckets_count(config.relative_attention_num_buckets)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_decoder_start_token_id(config.decoder_start_token_id)
    writer.add_tokenizer_model("t5")
    writer.add_token_list([b"<pad>", b"</s>", b"<unk>", *map(bytes, zip(range(256), strict=True)), *[b"x"] * 125])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([3, 3, 2, *[6] * 256, *[4] * 125])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_add_space_prefix(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, max(config.num_layers, config.num_decoder_layers))
    read_back = {}
    for key, parameter in model.state_dict().items():
        if key.endswith("embed_tokens.weight") or (key == "lm_head.weight" and not head):
            continue
        array = parameter.float().numpy()
        # Norms and biases stay float32, as llama.cpp has them.
        small = array.ndim == 1 or "relative_attention" in key
        chosen = gguf.GGMLQuantizationType["F32" if small else kind]
        data = gguf.quants.quantize(array, chosen)
        read_back[key] = gguf.quants.dequantize(data, chosen).reshape(array.shape)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), data, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_back


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_transformers(name, kind, tmp_path):
    model = make(name)
    read_back = write(model, tmp_path / "model.gguf", kind, head=name in ("gated, untied", "relu, tied, its head stored again"))
    model.load_state_dict({key: torch.tensor(array) for key, array in read_back.items()}, strict=False)
    ids = torch.tensor([[byte + 3 for byte in SOURCE] + [1]])
    forced = torch.tensor([[model.config.decoder_start_token_id, *(byte + 3 for byte in TARGET)]])
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=forced).logits[0].numpy()
    with contextlib.nullcontext() if name == "gated, untied" else pytest.warns(AssumptionWarning, match="no key tells"):
        found = load(tmp_path / "model.gguf", device="cpu")
    assert found.config.start_id == model.config.decoder_start_token_id
    logits = np.array(found.logits(SOURCE, TARGET).astype(mx.float32))
    assert np.abs(logits - expected[: len(logits)]).max() < 1e-4 * max(1.0, np.abs(expected).max())


def test_packed_types_without_the_package(tmp_path, monkeypatch):
    write(make("gated, untied"), tmp_path / "model.gguf", "Q8_0", head=True)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"model.gguf: '.*' is packed; .*pip install 'marlin-cli\[gguf\]'"):
        load(tmp_path / "model.gguf", device="cpu")
