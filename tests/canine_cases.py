"""Random weights for CANINE and its relatives that depend on nothing but their names and shapes: no file need hold them."""

import json
import zlib
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "num_hash_functions": 4, "num_hash_buckets": 2080, "max_position_embeddings": 2080,
}  # fmt: skip

# The same in marlin's words, with fewer rows.
SHAPE = {
    "d_model": 32, "layers": 2, "heads": 4, "ffn_dim": 64, "hash_functions": 4, "hash_buckets": 256, "max_characters": 256,
}  # fmt: skip

# The lengths at which everything is compared; real lengths of ragged batches at a padding.
LENGTHS = (4, 5, 127, 128, 129, 515, 2048)
RAGGED = {4: (1, 3, 4), 8: (1, 5, 8), 132: (3, 127, 128, 129), 528: (4, 515, 129, 260), 2048: (2048, 5, 515)}


def weight(name, shape):
    """A weight as outspoken as that of a trained network: norms are around 1, sums keep their size."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    values = generator.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return values * np.float32(0.3) + np.float32("LayerNorm.weight" in name or "layer_norm" in name)
    if "lang_ff" in name:
        return values * np.float32(0.3 if "bias" in name else 0.2)
    return values * np.float32(np.prod(shape[1:]) ** -0.5)


def give_weights(model):
    """Set the parameters of a torch model; its names and shapes."""
    import torch

    shapes = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shapes[name] = list(parameter.shape)
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return shapes


def batch(lengths, total, filler=0):
    """Ids [n, total] of random characters of all kinds, `filler` after so many real ones, and the mask of these."""
    generator = np.random.default_rng(total)
    highest = generator.choice([0x80, 0x800, 0x10000, 0x110000], (len(lengths), total))
    ids = (generator.random((len(lengths), total)) * (highest - 1)).astype(np.int64) + 1
    mask = np.arange(total) < np.array(lengths)[:, None]
    return np.where(mask, ids, filler), mask


def cases():
    """Real lengths and the padding of every batch that is compared."""
    return [((length,), length) for length in LENGTHS] + [(lengths, total) for total, lengths in RAGGED.items()]


def write_folder(folder, config, shapes, name="model.safetensors"):
    """A folder of transformers: config.json and the weights of `weight` under the names of `shapes`."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: weight(key, tuple(shape)) for key, shape in shapes.items()}, folder / name)
    return folder


def random_canine(**changes):
    """A small network whose every parameter is random."""
    import mlx.core as mx

    from marlin_cli.models.canine import Canine, CanineConfig

    network = Canine(CanineConfig(**SHAPE | changes))
    _randomise(network)
    mx.eval(network.parameters())
    return network


def random_la_canine(**changes):
    """A small network whose every parameter is random."""
    import mlx.core as mx

    from marlin_cli.models.la_canine import LaCanine, LaCanineConfig

    network = LaCanine(LaCanineConfig(**SHAPE | changes))
    _randomise(network)
    mx.eval(network.parameters())
    return network


def _randomise(network):
    import mlx.core as mx
    from mlx.utils import tree_flatten

    found = [
        (path, mx.array(weight(path.replace("norm.weight", "LayerNorm.weight"), array.shape)))
        for path, array in tree_flatten(network.parameters())
    ]
    network.load_weights(found)
    network.eval()


# LA-CANINE: the lengths of windows, and its kinds of adapters.
LA_TINY = TINY | {"num_hash_buckets": 520, "max_position_embeddings": 520, "num_labels": 3}
LA_KINDS = {
    "on": {"n_languages": 85},
    "off": {"language_adapter": "off"},
    "shared": {"n_languages": 3, "language_adapter": "shared"},
    "lookahead": {"n_languages": 85, "lookahead": 5},
}
LA_CASES = [((1,), 4), ((4,), 4), ((11,), 12), ((128, 1, 60), 128), ((129, 130), 132), ((511, 3, 128, 300), 512), ((515,), 516)]

# Codes of ten languages -> files of the shipped sample.
LA_LANGUAGES = {
    "cs": "cs", "de": "de", "el": "el", "en": "en_AU", "fr": "fr",
    "ja": "ja", "pl": "pl", "th": "th", "ar": "ar", "zh": "zh_Hans",
}  # fmt: skip
TEXT_BYTES = 10_000


def sample_text(name):
    """The first characters of a language in the shipped sample."""
    data = (Path(__file__).parents[1] / "calibration/sample/multilingual" / f"{name}.txt").read_bytes()
    return data[:TEXT_BYTES].decode("utf-8", errors="ignore")


def golden_la_network(folder, kind, language):
    """The network of la_canine_golden with adapters of `kind`, out of a folder as wtpsplit writes it."""
    import mlx.core as mx

    from marlin_cli.checkpoints import la_canine
    from marlin_cli.config import from_mapping
    from marlin_cli.models import fill
    from marlin_cli.models.la_canine import LaCanine, LaCanineConfig

    shapes = json.loads((DATA / "la_canine_golden.json").read_text())["shapes"][kind]
    config = {**LA_TINY, **LA_KINDS[kind], "model_type": "la-canine"}
    checkpoint = la_canine.read(write_folder(folder, config, shapes), language)
    network = LaCanine(from_mapping(LaCanineConfig, checkpoint.config, "here"))
    fill(network, checkpoint.weights, where="here", dtype=mx.float32)
    return network
