"""State dicts of the foreign fixtures as NumPy arrays, to be changed and written again."""

from pathlib import Path

import numpy as np

from marlin_cli.checkpoints.torch_file import TorchFile

FOREIGN = Path(__file__).parents[1] / "data" / "foreign"


def state_of(stem: str) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Tensors of a fixture by name, and the document in which they stand."""
    file = TorchFile(FOREIGN / f"{stem}.pt")
    references = file.document.get("state_dict", file.document)
    return {key: np.array(array) for key, array in file.arrays(references).items()}, file.document


def lucid_state(dims: tuple[int, ...] = (64, 32), inner: int = 64, length: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """A random MEGABYTE-pytorch of one layer a stage, without positions: nothing tells its heads or its longest context."""
    generator = np.random.default_rng(seed)
    fine, stages = dims[-1], len(dims)
    shapes: dict[str, tuple[int, ...]] = {"to_logits.weight": (256, fine), "to_logits.bias": (256,)}
    shapes["token_embs.0.weight"] = (256, fine)
    for stage, dim in enumerate(dims):
        shapes[f"start_tokens.{stage}"] = (dim,)
        layer = f"transformers.{stage}.layers.0"
        shapes |= {f"{layer}.0.norm.g": (dim,), f"{layer}.1.0.g": (dim,), f"transformers.{stage}.norm.g": (dim,)}
        shapes |= {f"{layer}.0.to_q.weight": (inner, dim), f"{layer}.0.to_kv.weight": (2 * inner, dim)}
        shapes |= {f"{layer}.0.to_out.weight": (dim, inner)}
        shapes |= {f"{layer}.1.1.weight": (4 * dim, dim), f"{layer}.1.1.bias": (4 * dim,)}
        shapes |= {f"{layer}.1.4.weight": (dim, 4 * dim), f"{layer}.1.4.bias": (dim,)}
        if stage < stages - 1:
            wide = fine * length ** (stages - 1 - stage)
            source, following = f"token_embs.{stages - 1 - stage}", f"to_next_transformer_projections.{stage}.1"
            shapes |= {f"{source}.0.weight": (256, fine), f"{source}.2.weight": (wide,), f"{source}.2.bias": (wide,)}
            shapes |= {f"{source}.3.weight": (dim, wide), f"{source}.3.bias": (dim,)}
            shapes |= {f"{source}.4.weight": (dim,), f"{source}.4.bias": (dim,)}
            shapes |= {f"{following}.weight": (length * dims[stage + 1], dim), f"{following}.bias": (length * dims[stage + 1],)}
    scale = {name: 0.3 if len(shape) == 1 else shape[-1] ** -0.5 for name, shape in shapes.items()}
    return {name: (generator.normal(size=shape) * scale[name]).astype("f4") for name, shape in shapes.items()}
