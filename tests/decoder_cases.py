"""Small random ByGPT5s and GBSTs, and folders of them as their authors' code writes them."""

import json

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from safetensors.numpy import save_file

from marlin_cli.checkpoints import bygpt5, hugging_face
from marlin_cli.models.bygpt5 import ByGPT5, ByGPT5Config
from marlin_cli.models.gbst import Gbst, GbstConfig

BYGPT5 = {"d_model": 32, "ffn_dim": 64, "heads": 2, "head_dim": 16, "layers": 2}
GBST = {
    "d_model": 32, "ffn_dim": 64, "heads": 2, "head_dim": 16, "encoder_layers": 2, "decoder_layers": 2,
    "block_sizes": (1, 2, 3, 4), "bytes_in_row": 3,
}  # fmt: skip


VERSION = {"transformers_version": "4.43.3"}  # which says that a head is tied and scaled, or neither


def random_bygpt5(**changes):
    """A network whose every parameter is random."""
    return _randomised(ByGPT5(ByGPT5Config(**BYGPT5 | changes)))


def random_gbst(**changes):
    """A network whose every parameter is random."""
    return _randomised(Gbst(GbstConfig(**GBST | changes)))


def _randomised(network):
    mx.random.seed(0)
    network.update(
        tree_map(lambda a: mx.random.normal(a.shape) * (0.3 if a.ndim == 1 else a.shape[-1] ** -0.5), network.parameters())
    )
    network.eval()
    mx.eval(network.parameters())
    return network


def bygpt5_folder(folder, network, **changes):
    """What uniformers saves: T5's names, and its configuration."""
    config = vars(network.config) | {"encoder_layers": 0, "decoder_layers": network.config.layers}
    names = bygpt5.names_of(vars(network.config))
    document = (
        hugging_face.config_of(config) | {"model_type": "bygpt5", "is_decoder": True, "is_encoder_decoder": False} | VERSION
    )
    return _folder(folder, document | changes, _under(names, network))


def gbst_folder(folder, network, **changes):
    """What gbswt5 saves: ByT5's names, and the front end among the encoder's embeddings."""
    config = network.config
    weights = dict(tree_flatten(network.parameters()))
    tensors = _under(hugging_face.names_of(vars(config)), network)
    front = "encoder.embed_tokens"
    tensors |= {
        f"{front}.embeds.weight": tensors["shared.weight"],
        f"{front}.positional_convol.2.convol.weight": weights["front.kernel"].T[:, None],
        f"{front}.positional_convol.2.convol.bias": weights["front.kernel_bias"],
        f"{front}.positional_convol.2.proj.weight": weights["front.proj.weight"][..., None],
        f"{front}.positional_convol.2.proj.bias": weights["front.proj.bias"],
        f"{front}.cand_scoring.0.weight": weights["front.score.weight"],
        f"{front}.cand_scoring.0.bias": weights["front.score.bias"],
    }
    document = hugging_face.config_of(vars(config)) | {
        **VERSION, "model_type": "gbswt5", "subword_blocks": [list(block) for block in config.block_kinds],
        "downsample_factor": config.bytes_in_row, "score_consensus_attn": config.consensus, "max_subword_block_size": None,
    }  # fmt: skip
    return _folder(folder, document | changes, tensors)


def _under(names, network):
    weights = dict(tree_flatten(network.parameters()))
    return {theirs: weights[ours] for ours, theirs in names.items()}


def _folder(folder, document, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(document))
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")
    return folder
