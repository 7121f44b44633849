"""Every variant of the CUDA kernels, composed as MLX does, through nvcc: a few of each always, all of them in `make slow`."""

import itertools
import re
from dataclasses import replace

import mlx.core as mx
import pytest
from cuda_composer import compile_to_cubin, compose, nvcc, translation_unit

from marlin_cli.engine.cuda_answers import decoder_arrays
from marlin_cli.engine.cuda_patches import global_stage, local_stage
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cuda, cuda_stages, cuda_text
from marlin_cli.ops.cuda_kept import Types, variant
from marlin_cli.ops.cuda_kernels import PAGES_A_LAUNCH, SOURCES
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(nvcc() is None, reason="nvcc is not on the PATH, or the gcc that it needs")]
BITS = {"float16": 16, "bfloat16": 16, "float32": 32}
REGISTERS_OF_A_BLOCK = 65536
THREADS = dict.fromkeys(("patch_embed", "strided_pool", "unpack"), 256)  # else 128


def threads_of(name, template):
    """Of a block."""
    return 32 * template["WARPS"] if name == "marlin_gemm_fp4" else THREADS.get(name, 128)


def gemm_variants():
    kinds = [(4, 16, False), (4, 32, False), (8, 32, False), (4, 64, True), (8, 64, True)]
    for dtype, (bits, group, affine), (count, rows) in itertools.product(
        BITS, kinds, [(1, 64), (1, 4096), (8, 8192), (16, 64), (16, 4096), (32, 64), (32, 2048), (64, 4096)]
    ):
        if affine and dtype == "float32":
            continue
        plan = cuda._gemm_plan(count, rows, 4096, bits, getattr(mx, dtype))
        scales = dtype if affine else "uint8"
        yield (
            {"T": dtype, "BITS": bits, "GROUP": group, "AFFINE": affine, **plan},
            {"x": dtype, "weight": "uint32", "scales": scales, "zeros": scales},
            {"out": dtype},
        )


def attention_variants():
    for (dtype, head_dim), (tile, warps, masked) in itertools.product(
        itertools.product(BITS, [16, 64, 96, 256]), [(1, 1, False), (2, 4, True), (4, 1, True), (4, 4, False)]
    ):
        template = {"T": dtype, "HEAD_DIM": head_dim, "TILE": tile, "WARPS": warps, "CAUSAL": not masked}
        template |= {"HAS_WINDOW": masked, "WINDOW": 7, "HAS_PADDING": masked, "HAS_LENGTHS": masked, "HAS_BIAS": masked}
        integers = {"left_padding": "int32", "lengths": "int32"}
        inputs = {"queries": dtype, "keys": dtype, "values": dtype, **integers, "relative_bias": dtype, "factor": "float32"}
        yield template, inputs, {"out": dtype}


def split_variants(pages):
    kinds = itertools.product(BITS, [(4, 4), (8, 8), (4, 8), (8, None), (None, None)])
    shapes = [(32, 1, False), (128, 4, False), (32, 4, True), (256, 4, True)]  # each kind in two of them, by turns
    for i, (dtype, (keys, values)) in enumerate(kinds):
        for head_dim, tile, one_part in shapes[i % 2 :: 2]:
            stored = {"K": keys or BITS[dtype], "V": values or BITS[dtype]}
            types = {name: "uint32" if bits < 16 else dtype for name, bits in stored.items()}
            out = dtype if one_part else "float32"
            template = {"T": dtype, "OUT": out, "HEAD_DIM": head_dim, "TILE": tile, "HAS_LENGTHS": one_part}
            template |= {"K_TYPE": types["K"], "K_BITS": stored["K"], "V_TYPE": types["V"], "V_BITS": stored["V"]}
            inputs = {"queries": dtype, "lengths": "int32", "factor": "float32", "span": "int32"}
            if pages:
                template |= {"CAUSAL": not one_part, "HAS_WINDOW": one_part, "WINDOW": 7, "HAS_PADDING": one_part}
                inputs["left_padding"] = "int32"
            for place in [f"_{i}" for i in range(PAGES_A_LAUNCH)] if pages else [""]:
                inputs |= {f"keys{place}": types["K"], f"values{place}": types["V"]}
                inputs |= {f"key_scales{place}": "uint8", f"value_scales{place}": "uint8"}
            yield template, inputs, {"parts": out, "log_weights": "float32"}


def combine_variants():
    for dtype in BITS:
        yield {"T": dtype, "HEAD_DIM": 64}, {"parts": "float32", "log_weights": "float32"}, {"out": dtype}


def embed_variants():
    for dtype, ids, whole in itertools.product(BITS, ["uint8", "int32", "int64", "uint32"], [False, True]):
        values = 128 // BITS[dtype] if whole else 1
        yield {"T": dtype, "VALUES": values}, {"ids": ids, "table": dtype}, {"out": dtype}


def pool_variants():
    for dtype, maximum in itertools.product(BITS, [False, True]):
        yield {"T": dtype, "STRIDE": 4, "MAXIMUM": maximum}, {"x": dtype}, {"out": dtype}


def unpack_variants():
    kinds = [(4, 16, False), (4, 32, False), (8, 32, False), (4, 64, True), (8, 32, True)]
    for dtype, (bits, group, affine) in itertools.product(BITS, kinds):
        scales = dtype if affine else "uint8"
        template = {"T": dtype, "BITS": bits, "GROUP": group, "AFFINE": affine}
        yield template, {"weight": "uint32", "scales": scales, "zeros": scales}, {"out": dtype}


VARIANTS = {
    "marlin_gemm_fp4": list(gemm_variants()),
    "flash_attention": list(attention_variants()),
    "flash_attention_kv_fp4": list(split_variants(pages=True)),
    "flash_attention_cross_asymmetric": list(split_variants(pages=False)),
    "attention_combine": list(combine_variants()),
    "patch_embed": list(embed_variants()),
    "strided_pool": list(pool_variants()),
    "unpack": list(unpack_variants()),
}
CHUNK = 16  # variants that are compiled in one go


def kept(source, template, inputs, outputs):
    """A kernel as `cuda_kept` composes it, without its headers."""
    types = Types(
        tuple((getattr(mx, inputs[name]), 4) for name in source.inputs),
        tuple(getattr(mx, outputs[name]) for name in source.outputs),
    )
    named = tuple((key, getattr(mx, value) if isinstance(value, str) else value) for key, value in template.items())
    return variant(source, named, types, threads_of(source.name, template)).text.removeprefix(source.header())


def check(name, variants, architecture, folder):
    """They compile without a warning, spill next to nothing, and fit the registers: kept ones, and MLX's otherwise."""
    source = SOURCES[name]
    if source.row_contiguous:
        kernels = sorted({kept(source, *each) for each in variants})
        text = "\n".join([cuda_text.PRELUDE, source.header(), *kernels])
    else:
        # Types of inputs are no part of the name, so it may come twice.
        kernels = [compose(source, *variant, f"_{i}") for i, variant in enumerate(variants)]
        text = translation_unit(source, kernels)
    report = compile_to_cubin(text, architecture, folder)
    spilled = re.findall(r"(\d+) bytes spill stores", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(spilled) == len(registers) == len(kernels)
    bounded = any(template.get("TOGETHER") for template, *_ in variants)  # a few bytes are less than a block that waits
    assert max(map(int, spilled)) <= (64 if bounded else 0)
    assert max(registers) * max(threads_of(name, template) for template, *_ in variants) <= REGISTERS_OF_A_BLOCK


def test_every_kernel_has_its_variants():
    assert VARIANTS.keys() == SOURCES.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_one_variant_compiles(name, tmp_path):
    check(name, VARIANTS[name][:1], "sm_90a", tmp_path)


def chunks():
    for name, architecture in itertools.product(SOURCES, ["sm_90a", "sm_80"]):
        for start in range(0, len(VARIANTS[name]), CHUNK):
            yield pytest.param(name, architecture, start, id=f"{name}-{architecture}-{start}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture", "start"), chunks())
def test_all_variants_compile(name, architecture, start, tmp_path):
    check(name, VARIANTS[name][start : start + CHUNK], architecture, tmp_path)


# Of stages that one launch takes whole: type, format of the weights, streams, options.
STAGES = [
    (mx.bfloat16, "nvfp4", 1, {}),
    (mx.bfloat16, None, 16, {"qk_norm": True, "global_kv_heads": 2}),
    (mx.float32, "mxfp8", 2, {"norm": "layernorm", "ffn": "gelu", "ffn_bias": True}),
    (mx.bfloat16, "int4", 9, {"attention_window": 7}),
    (mx.float32, None, 1, {"norm": "variance", "ffn": "relu"}),
]


@pytest.mark.parametrize("architecture", ["sm_90a", pytest.param("sm_80", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "format", "streams", "options"),
    [pytest.param(*each, marks=[] if i == 0 else pytest.mark.slow) for i, each in enumerate(STAGES)],
)
def test_whole_stages_compile(dtype, format, streams, options, architecture, tmp_path, monkeypatch):
    """Both kernels of a small model, as the compiler at run time gets them; with few streams they spill nothing, shared too."""
    monkeypatch.setattr(cuda_stages, "multiprocessors", lambda: 132)
    config = {"patch_size": 8, "global_layers": 2, "global_dim": 256, "global_heads": 4, "local_layers": 2, "local_dim": 128}
    network = MegaByte(MegaByteConfig(**config, local_heads=2, **options))
    network.set_dtype(dtype)
    if format is not None:
        settings = QuantizationSettings(global_format=format, local_format=format, group_size=32 if format == "int4" else None)
        network = quantize_network(network, settings, method="rtn").network
    shared = replace(global_stage(network), ranks=2)
    for stage in (global_stage(network) if streams > 1 else shared, local_stage(network)):
        sizes = cuda_stages.sizes_of(stage, streams, cuda_stages.blocks_of(stage), 8)
        text = cuda_text.PRELUDE + cuda_text.text(cuda_stages.kernel_name(stage), sizes)
        report = compile_to_cubin(text, architecture, tmp_path, strict=False)
        if streams == 1:
            # An array of the machine that is indexed as it runs puts all that the machine keeps into local memory.
            assert all(int(count) <= 128 for count in re.findall(r"(\d+) bytes (?:spill stores|stack frame)", report))


@pytest.mark.parametrize(
    ("format", "answers", "bits"),
    [("nvfp4", 1, 4), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((None, 16, 16), ("int8", 8, 8)))],
)
def test_a_decoder_compiles(format, answers, bits, tmp_path, monkeypatch):
    """Its steps, as the compiler at run time gets them; with few answers they spill little."""
    monkeypatch.setattr(cuda_stages, "multiprocessors", lambda: 132)
    network = ByT5(ByT5Config(encoder_layers=1))
    network.set_dtype(mx.bfloat16)
    if format is not None:
        group = 32 if format == "int8" else None
        settings = QuantizationSettings(
            encoder_format=format, decoder_format=format, cross_format=format, wo_format="mxfp8", group_size=group
        )
        network = quantize_network(network, settings, method="rtn").network
    stage = replace(decoder_arrays(network), memory_bits=bits)
    sizes = cuda_stages.sizes_of(stage, answers, cuda_stages.blocks_of(stage), 1)
    report = compile_to_cubin(cuda_text.PRELUDE + cuda_text.text("answer_decode", sizes), "sm_90a", tmp_path, strict=False)
    if answers == 1:
        assert all(int(count) <= 128 for count in re.findall(r"(\d+) bytes spill stores", report))


def test_a_prompts_attention_compiles(tmp_path):
    """In rows, as it is kept."""
    source = SOURCES["flash_attention"]
    kernels = [kept(source, *VARIANTS["flash_attention"][i]) for i in (3, 5)]
    compile_to_cubin("\n".join([cuda_text.PRELUDE, source.header(), *kernels]), "sm_90a", tmp_path)


def test_a_fault_is_found(tmp_path):
    source = SOURCES["strided_pool"]
    broken = compose(source, *VARIANTS["strided_pool"][0]).replace("= x +", "= y +")
    with pytest.raises(AssertionError, match='identifier "y" is undefined'):
        compile_to_cubin(translation_unit(source, [broken]), "sm_90a", tmp_path)
