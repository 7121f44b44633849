"""ByGPT5 against transformers' T5 decoder without encoder states, and GBST against charformer-pytorch under its T5."""

import json

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.checkpoints import read_checkpoint
from marlin_cli.config import from_mapping
from marlin_cli.engine.answer_requests import Answer, AnswerLimits
from marlin_cli.engine.answering import answer
from marlin_cli.engine.generation import generate
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.stopping import Stopping
from marlin_cli.models import fill
from marlin_cli.models.bygpt5 import ByGPT5, ByGPT5Config
from marlin_cli.models.gbst import Gbst, GbstConfig

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")

pytestmark = pytest.mark.peers

TOLERANCE = 1e-4
TINY = {
    "vocab_size": 384, "d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3,
    "decoder_start_token_id": 0,
}  # fmt: skip
KINDS = {
    "gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "gated, tied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": True},
    "relu": {
        "feed_forward_proj": "relu",
        "tie_word_embeddings": False,
        "vocab_size": 409,
        "relative_attention_max_distance": 20,
    },
}
BLOCKS = {
    "1 to 4": ((1, 0), (2, 0), (3, 0), (4, 0)),
    "those of gbswt5": ((1, 0), (2, 0), (3, 0), (4, 0), (6, 0), (9, 0)),
    "with offsets": ((1, 0), (3, 1), (4, 2), (2, 1)),
}


def random_t5(kind):
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**TINY | KINDS[kind])).eval()
    with torch.no_grad():
        if not KINDS[kind]["tie_word_embeddings"]:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 48**-0.5)
        else:
            model.shared.weight.mul_(0.3)
        for name, parameter in model.named_parameters():
            if "relative_attention" in name:
                parameter.normal_(0, 1)
            if "layer_norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write(folder, model, kind, tensors, **changes):
    """As the authors' versions of transformers write it; the newest says that every T5 is tied."""
    folder.mkdir(exist_ok=True)
    torch.save({name: tensor.clone() for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    document = {name: value for name, value in model.config.to_dict().items() if name != "scale_decoder_outputs"}
    (folder / "config.json").write_text(json.dumps(document | KINDS[kind] | changes))
    return folder


def filled(network, checkpoint):
    fill(network, checkpoint.weights, where="here", dtype=mx.float32)
    return network


def bygpt5(kind, folder):
    """T5's decoder and the file that uniformers would make of it."""
    model = random_t5(kind)
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("encoder.") and ".layer.1." not in name
    }
    write(folder, model, kind, tensors, model_type="bygpt5", is_decoder=True, is_encoder_decoder=False)
    checkpoint = read_checkpoint(folder)
    return model, filled(ByGPT5(from_mapping(ByGPT5Config, checkpoint.config, "here")), checkpoint)


@torch.no_grad()
def decoder_logits(model, kind, ids):
    hidden = model.decoder(input_ids=ids).last_hidden_state
    return model.lm_head(hidden * 48**-0.5 if KINDS[kind]["tie_word_embeddings"] else hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_alone(kind, tmp_path):
    model, network = bygpt5(kind, tmp_path / "model")
    ids = np.random.default_rng(0).integers(3, 259, (3, 300))
    assert (
        np.abs(np.array(network(mx.array(ids))) - decoder_logits(model, kind, torch.from_numpy(ids)).numpy()).max() < TOLERANCE
    )


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_bytes(kind, tmp_path):
    model, network = bygpt5(kind, tmp_path / "model")
    texts = [b"hello", b"world", b"a", b"of another length", "東京".encode()]
    found = [b""] * len(texts)
    for piece in generate(network, texts, Stopping(80), Sampling()):
        found[piece.stream] += piece.data
    for text, data in zip(texts, found, strict=True):
        ids = [byte + 3 for byte in text]
        while len(ids) < len(text) + 80:
            value = int(decoder_logits(model, kind, torch.tensor([ids]))[0, -1].argmax())
            if value == 1:
                break
            ids.append(value)
        assert data == bytes(value - 3 for value in ids[len(text) :] if 3 <= value < 259)


def gbst(blocks, bytes_in_row, folder, *, consensus=True, kind="gated", **changes):
    """charformer-pytorch's front end, transformers' T5, and the network out of the file that gbswt5 would make of them."""
    charformer = pytest.importorskip("charformer_pytorch", reason="needs charformer-pytorch 0.0.4")
    model = random_t5(kind)
    front = charformer.GBST(
        num_tokens=model.config.vocab_size,
        dim=48,
        blocks=blocks,
        downsample_factor=bytes_in_row,
        score_consensus_attn=consensus,
    ).eval()
    with torch.no_grad():
        for parameter in front.parameters():
            parameter.mul_(2)
        front.score_fn[0].weight.mul_(3)
        front.token_emb.weight = model.shared.weight
    names = {
        "token_emb": "embeds",
        "pos_conv.2.conv": "positional_convol.2.convol",
        "pos_conv.2.proj_out": "positional_convol.2.proj",
        "score_fn.0": "cand_scoring.0",
    }
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    for name, tensor in front.state_dict().items():
        module, _, last = name.rpartition(".")
        tensors[f"encoder.embed_tokens.{names[module]}.{last}"] = tensor
    said = {"subword_blocks": blocks, "downsample_factor": bytes_in_row, "score_consensus_attn": consensus}
    checkpoint = read_checkpoint(write(folder, model, kind, tensors, model_type="gbswt5", **said))
    return model, front, filled(Gbst(from_mapping(GbstConfig, checkpoint.config | changes, "here")), checkpoint)


@pytest.mark.parametrize("bytes_in_row", [1, 3, 4])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_front_end_before_byt5(blocks, masks, bytes_in_row, tmp_path):
    consensus, kind = blocks != "1 to 4" or masks, "gated, tied" if masks else "gated"
    model, front, network = gbst(
        BLOCKS[blocks], bytes_in_row, tmp_path / "model", consensus=consensus, kind=kind, masks=masks, reads_filler=True
    )
    rng = np.random.default_rng(0)
    for lengths, total in (((10,), 10), ((12, 12), 12), ((37,), 37), *([((5, 37, 1, 20), 37)] if masks else [])):
        mask = np.arange(total) < np.array(lengths)[:, None]
        ids = np.where(mask, rng.integers(3, 259, mask.shape), 0)
        target = np.pad(rng.integers(3, 259, (len(lengths), 6)), ((0, 0), (1, 0)))
        with torch.no_grad():
            rows, kept = front(torch.from_numpy(ids), mask=torch.from_numpy(mask) if masks else None)
            given = {"attention_mask": kept.long()} if masks else {}
            theirs = model(inputs_embeds=rows, decoder_input_ids=torch.from_numpy(target), **given)
        counts = mx.array(lengths) if not mask.all() else None
        found = np.array(network(mx.array(ids), mx.array(target), counts))
        assert np.abs(found - theirs.logits.numpy()).max() < TOLERANCE
        real = kept.numpy() if masks else np.ones(rows.shape[:2], dtype=bool)
        states = np.array(network.encode(mx.array(ids), counts))
        assert np.abs(states - theirs.encoder_last_hidden_state.numpy())[real].max() < TOLERANCE


def test_answers_behind_a_front_end(tmp_path):
    """Texts side by side have the answers that transformers gives each alone."""
    model, front, network = gbst(BLOCKS["1 to 4"], 3, tmp_path / "model")
    sources = [[*(byte + 3 for byte in text), 1] for text in (b"hello there", b"a", b"what is this, then")]
    found = {}
    for news in answer(network, sources, AnswerLimits(30)):
        found |= {stream: list(each.ids) for stream, each in news if isinstance(each, Answer)}
    for stream, source in enumerate(sources):
        ids = torch.tensor([source])
        with torch.no_grad():
            rows, kept = front(ids, mask=torch.ones_like(ids).bool())
            given = {"inputs_embeds": rows, "attention_mask": kept.long()}
            theirs = model.generate(**given, max_new_tokens=30, num_beams=1, do_sample=False)[0].tolist()[1:]
        assert found[stream] == (theirs[: theirs.index(1)] if 1 in theirs else theirs)
