"""Block-Recurrent Transformers as google-research/meliad computes them, transcribed in numpy (float64), a window at a time.

Written again from `transformer/memory/{decoder_stack, transformer_layer, transformer_base}.py`, `transformer/attention.py`,
`nn_components.py`, `position.py` and `position_t5.py` of its commit cc1aef5, for what `configs/base_memory.gin` with
`recurrent/*.gin` asks: no dropout, no external memory, no importance, no feedback to other layers. Parameters have the
names and shapes of its flax modules, which take them as they are and give the same logits within 2e-6; kernels are [in, out].
"""

from dataclasses import dataclass

import numpy as np

Parameters = dict[str, np.ndarray]


@dataclass(frozen=True)
class Sizes:
    """Those that gin files set."""

    vocab_size: int = 256
    embedding_size: int = 32
    mlp_dim: int = 64
    num_heads: int = 2
    head_size: int = 16
    num_layers: int = 3
    recurrent_layer_indices: tuple[int, ...] = (0, 2)
    window_length: int = 8
    recurrent_num_states: int = 6
    recurrent_gate_type: str = "bias"
    recurrent_single_gate: bool = False
    recurrent_skip_ffn: bool = False


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter."""
    width, inner = sizes.embedding_size, sizes.num_heads * sizes.head_size
    found: dict[str, tuple[int, ...]] = {"embed/embedding": (sizes.vocab_size, width), "final_layernorm/scale": (width,)}
    for layer in range(sizes.num_layers):
        recurrent, own = layer in sizes.recurrent_layer_indices, f"transformer{layer}"
        found[f"{own}/relative_positions/rel_embedding"] = (sizes.num_heads, 32)
        for base in ("tbase", "recurrent_tbase") if recurrent else ("tbase",):
            of_states, path = base == "recurrent_tbase", f"{own}/{base}"
            for name in ("keys", "values", "queries", *(["queries2"] if recurrent else [])):
                found[f"{path}/_kvq/{name}_layer/kernel"] = (width, inner)
            found[f"{path}/_kvq/attention_scale"] = (sizes.num_heads,)
            found[f"{path}/_kvq/pre_attn_layernorm/scale"] = (width,)
            if recurrent:
                found[f"{path}/attention_scale2"] = (sizes.num_heads,)
            read = inner * (2 if recurrent else 1)
            single, skip = (of_states and each for each in (sizes.recurrent_single_gate, sizes.recurrent_skip_ffn))
            if not single:
                found[f"{path}/post_attn_mlp/output_layer/kernel"] = (read, width)
                found |= _gate_shapes(f"{path}/post_attn_mlp", of_states, read, sizes)
            if not single and not skip:
                found[f"{path}/pre_ffn_layernorm/scale"] = (width,)
            if not skip:
                found[f"{path}/ffn/hidden0/kernel"] = (read if single else width, sizes.mlp_dim)
                found[f"{path}/ffn/output_layer/kernel"] = (sizes.mlp_dim, width)
                found |= _gate_shapes(f"{path}/ffn", of_states, sizes.mlp_dim, sizes)
            if of_states:
                found[f"{path}/_kvq/position_embeddings"] = (sizes.recurrent_num_states, width)
                found[f"{own}/recurrent_initial_state"] = (sizes.recurrent_num_states, width)
    return found


def _gate_shapes(path: str, of_states: bool, read: int, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    width = sizes.embedding_size
    if not of_states:
        return {}
    if sizes.recurrent_gate_type == "bias":
        return {f"{path}/gate_bias": (width,)}
    layers = (f"{path}/{name}_gate" for name in ("input", "forget"))
    return {f"{layer}/{name}": shape for layer in layers for name, shape in (("kernel", (read, width)), ("bias", (width,)))}


def random_parameters(sizes: Sizes, seed: int = 0) -> Parameters:
    """Every parameter at random; gains and scales of both signs."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) * (shape[0] ** -0.5 if name.endswith("kernel") else 1.0)).astype(np.float32)
        for name, shape in shapes_of(sizes).items()
    }


class NumpyMeliad:
    """The stack; what each layer hands on from window to window is kept in it, as `state` variables are."""

    def __init__(self, sizes: Sizes, parameters: Parameters) -> None:
        self.sizes, self.parameters = sizes, {name: array.astype(np.float64) for name, array in parameters.items()}
        self.carried: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray | None]] = {}

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Logits [n, rows, vocab] of a segment [n, rows] of whole windows that follows the ones before."""
        xs = self.parameters["embed/embedding"][ids]
        for layer in range(self.sizes.num_layers):
            xs = self._layer(layer, xs)
        xs = layer_norm(xs, self.parameters["final_layernorm/scale"])
        return xs @ self.parameters["embed/embedding"].T / np.sqrt(xs.shape[-1])

    def _layer(self, layer: int, xs: np.ndarray) -> np.ndarray:
        sizes, own, count = self.sizes, f"transformer{layer}", xs.shape[0]
        recurrent, window = layer in sizes.recurrent_layer_indices, sizes.window_length
        keys, values, queries, queries2 = self._kvq(f"{own}/tbase", xs)
        if layer in self.carried:
            old_keys, old_values, state = self.carried[layer]
        else:
            old_keys = old_values = np.zeros((count, window, sizes.num_heads, sizes.head_size))
            initial = self.parameters.get(f"{own}/recurrent_initial_state")
            state = None if initial is None else np.broadcast_to(initial, (count, *initial.shape))
        bias, mask = self._positions(own)
        self_found, cross_found = [], []
        for start in range(0, xs.shape[1], window):
            part = slice(start, start + window)
            seen_keys = np.concatenate([old_keys, keys[:, part]], axis=1)
            seen_values = np.concatenate([old_values, values[:, part]], axis=1)
            old_keys, old_values = keys[:, part], values[:, part]
            scale, scale2 = self._scales(f"{own}/tbase")
            self_found.append(attend(seen_keys, seen_values, queries[:, part], scale, bias, mask))
            if state is not None:
                r_keys, r_values, r_queries, r_queries2 = self._kvq(f"{own}/recurrent_tbase", state)
                r_scale, r_scale2 = self._scales(f"{own}/recurrent_tbase")
                of_states = attend(r_keys, r_values, r_queries, r_scale)
                of_tokens = attend(seen_keys, seen_values, r_queries2, r_scale2)
                cross_found.append(attend(r_keys, r_values, queries2[:, part], scale2))
                state = self._post_attention(f"{own}/recurrent_tbase", state, of_states, of_tokens)
        self.carried[layer] = old_keys, old_values, state
        cross = np.concatenate(cross_found, axis=1) if recurrent else None
        return self._post_attention(f"{own}/tbase", xs, np.concatenate(self_found, axis=1), cross)

    def _kvq(self, path, xs):
        xs = layer_norm(xs, self.parameters[f"{path}/_kvq/pre_attn_layernorm/scale"])
        xs = xs + self.parameters.get(f"{path}/_kvq/position_embeddings", 0.0)
        found = []
        for name in ("keys", "values", "queries", "queries2"):
            kernel = self.parameters.get(f"{path}/_kvq/{name}_layer/kernel")
            if kernel is None:
                found.append(None)
                continue
            rows = (xs @ kernel).reshape(*xs.shape[:2], self.sizes.num_heads, self.sizes.head_size)
            length = np.sqrt((rows**2).sum(axis=-1, keepdims=True) + 1e-6)
            found.append(rows if name == "values" else rows / length)
        return found

    def _scales(self, path):
        scale, scale2 = self.parameters[f"{path}/_kvq/attention_scale"], self.parameters.get(f"{path}/attention_scale2")
        return np.abs(scale), None if scale2 is None else np.abs(scale2)

    def _positions(self, own):
        """Bias [heads, queries, keys] of a window and the one before, and which keys are seen."""
        window = self.sizes.window_length
        relative = np.arange(2 * window)[None] - (np.arange(window)[:, None] + window)
        back = np.maximum(-relative, 0)
        far = 16 + (np.log(back / 16 + np.finfo(np.float32).eps) / np.log(128 / 16) * 16).astype(np.int32)
        buckets = np.where(back < 16, back, np.minimum(far, 31))
        table = self.parameters[f"{own}/relative_positions/rel_embedding"]
        return table[:, buckets], (relative < 0) & (relative >= -window)

    def _post_attention(self, path, xs, attention, cross):
        sizes = self.sizes
        of_states = path.endswith("recurrent_tbase")
        read = attention if cross is None else np.concatenate([attention, cross], axis=2)
        read = read.reshape(*xs.shape[:2], -1)
        if of_states and sizes.recurrent_single_gate:
            behind, ffn_input = xs, read
        else:
            update = read @ self.parameters[f"{path}/post_attn_mlp/output_layer/kernel"]
            behind = self._gated(f"{path}/post_attn_mlp", of_states, read, xs, update)
            if of_states and sizes.recurrent_skip_ffn:
                return behind
            ffn_input = layer_norm(behind, self.parameters[f"{path}/pre_ffn_layernorm/scale"])
        hidden = np.maximum(ffn_input @ self.parameters[f"{path}/ffn/hidden0/kernel"], 0)
        update = hidden @ self.parameters[f"{path}/ffn/output_layer/kernel"]
        if of_states and sizes.recurrent_single_gate:
            update = np.tanh(update)
        return self._gated(f"{path}/ffn", of_states, hidden, behind, update)

    def _gated(self, path, of_states, hidden, before, update):
        if not of_states:
            return before + update
        if self.sizes.recurrent_gate_type == "bias":
            kept = sigmoid(self.parameters[f"{path}/gate_bias"])
            return before * kept + update * (1 - kept)
        told = {
            name: hidden @ self.parameters[f"{path}/{name}_gate/kernel"] + self.parameters[f"{path}/{name}_gate/bias"]
            for name in ("forget", "input")
        }
        return before * sigmoid(told["forget"] + 1) + update * sigmoid(told["input"] - 1)


def attend(keys, values, queries, scale, bias=None, mask=None):
    """Rows [n, queries, heads, head_size]."""
    scores = np.einsum("nqhd,nkhd->nhqk", queries, keys)
    scores = (scores if bias is None else scores + bias) * scale[None, :, None, None]
    scores = scores if mask is None else np.where(mask, scores, -1e6)
    most = np.maximum(scores.max(axis=-1, keepdims=True), -1000.0)  # what is masked everywhere attends to nothing
    shares = np.exp(scores - most)
    return np.einsum("nhqk,nkhd->nqhd", shares / (shares.sum(axis=-1, keepdims=True) + np.exp(-1000.0 - most)), values)


def layer_norm(xs, gain):
    """Without a mean."""
    return xs / np.sqrt((xs**2).mean(axis=-1, keepdims=True) + 1e-6) * gain


def sigmoid(x):
    return 1 / (1 + np.exp(-x))
