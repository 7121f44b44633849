"""`marlin encode`: the states of an encoder, or a vector for each text; JSON lines, .npy or .safetensors."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from marlin_cli.commands.options import Precision


class Pool(str, Enum):
    """How states become a vector."""

    none = "none"
    mean = "mean"
    pooler = "pooler"


def encode(
    command_line: typer.Context,
    model: Annotated[str, typer.Argument(help="Path or hub repository of a CANINE, LA-CANINE or ByT5.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="File that holds the text; - is stdin.")] = None,
    hex_prompt: Annotated[str | None, typer.Option("--hex", help="The text's bytes as hexadecimal digits.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help='JSONL of texts: {"prompt": text, "id": ..}, {"prompt_base64": ..} or {"prompt_hex": ..}.'),
    ] = None,
    pool: Annotated[
        Pool, typer.Option(help="One vector a text: the mean of its states, or what CANINE's pooler makes of the first.")
    ] = Pool.none,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=".npy (vectors, or the states of one text) or .safetensors, in place of lines."),
    ] = None,
    pad_to: Annotated[
        int | None, typer.Option(help="Positions to pad texts to, as where the checkpoint was used: they change states.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="LA-CANINE: the language, for example cs.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are read at once.")] = 16,
    activation_bits: Annotated[
        int, typer.Option(help="8 rounds what packed layers multiply: faster on a CPU, a little less accurate.")
    ] = 16,
    dtype: Annotated[Precision, typer.Option(help="Of weights and activations; results are float32.")] = Precision.auto,
    device: Annotated[str, typer.Option(help="auto, metal, cuda or cpu.")] = "auto",
) -> None:
    """Write states or vectors of texts.

    An object for each position of each text, with its place and state; or with --pool for each text.

    A pipe is read line by line, a text each; --prompt-file - takes it as one text. Positions are characters (of a ByT5
    bytes) and the marks around them. Offsets count from 0, and an end is the place after the last one.
    """
    from marlin_cli.backend import require_mlx

    require_mlx()
    from marlin_cli.api import load
    from marlin_cli.checkpoints import ImportOptions
    from marlin_cli.commands import encode_run
    from marlin_cli.commands.given import check_models
    from marlin_cli.commands.options import dtype_of
    from marlin_cli.commands.texts import Beside, Sources, texts_of
    from marlin_cli.commands.vector_files import check_suffix
    from marlin_cli.continuing_model import ContinuingModel
    from marlin_cli.writing import check_output_file

    check_models(command_line, [model])
    if output is not None:
        check_suffix(output)
        check_output_file(output)
    sources = Sources(prompt, prompt_file, hex_prompt, prompts)
    sources.check()
    loaded = load(
        model,
        device=device,
        activation_bits=activation_bits,
        dtype=dtype_of(dtype),
        options=None if language is None else ImportOptions(language=language),
    )
    assert not isinstance(loaded, ContinuingModel)
    encode_run.run(loaded, texts_of(sources, Beside()), encode_run.Request(pool.value, pad_to, batch_size, output))
