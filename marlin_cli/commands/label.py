"""`marlin label`: what a model says of texts, one JSON object each; or the sentences of a stream, as soon as they are sure."""

from typing import Annotated, Any

import typer

from marlin_cli.commands.options import Precision


def label(
    command_line: typer.Context,
    model: Annotated[str, typer.Argument(help="Path or hub repository of a CANINE, LA-CANINE or ByT5 with a head.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="File that holds the text; - is stdin.")] = None,
    hex_prompt: Annotated[str | None, typer.Option("--hex", help="The text's bytes as hexadecimal digits.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help='JSONL of texts: {"prompt": text, "id": ..}, and second, question or choices beside it.'),
    ] = None,
    tabs: Annotated[bool, typer.Option("--tabs", help="A line of a pipe is a pair of texts with a tab in between.")] = False,
    second: Annotated[str | None, typer.Option(help="The other text of a pair.")] = None,
    question: Annotated[str | None, typer.Option(help="What the text shall answer.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="A text that may go on from the text; repeatable.")] = None,
    language: Annotated[str | None, typer.Option(help="LA-CANINE: the language, for example cs.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Least score of what is shown. LA-CANINE: a score above it ends a sentence (0.01)."),
    ] = None,
    best: Annotated[int | None, typer.Option(min=1, help="Labels, answers (1) or choices to show of a text.")] = None,
    outside: Annotated[list[str] | None, typer.Option(help="Label that says nothing (O); repeatable.")] = None,
    no_merge: Annotated[bool, typer.Option("--no-merge", help="A span for each character, labels as they are.")] = False,
    pad_to: Annotated[
        int | None, typer.Option(help="Positions to pad texts to, as where the checkpoint was used: they change what it says.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Characters read at once (512; with a question 2048).")] = None,
    stride: Annotated[int | None, typer.Option(help="Characters from a window to the next (64; of answers 128).")] = None,
    longest: Annotated[int | None, typer.Option(help="Characters of a sentence (65536) or answer (128) at most.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="LA-CANINE: a line for each sentence in place of an object.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="With --lines: control codes as they are, on a terminal too.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are read at once.")] = 16,
    activation_bits: Annotated[
        int, typer.Option(help="8 rounds what packed layers multiply: faster on a CPU, a little less accurate.")
    ] = 16,
    dtype: Annotated[Precision, typer.Option(help="Of weights and activations.")] = Precision.auto,
    device: Annotated[str, typer.Option(help="auto, metal, cuda or cpu.")] = "auto",
) -> None:
    """Label texts, or cut them into sentences.

    Labels are of classes, of characters, or answers in a text.

    A pipe is read line by line, a text each; --prompt-file - takes it as one text. LA-CANINE takes it as one text of any
    length, and each sentence leaves as soon as it is sure. Offsets count bytes and characters from 0, and an end is the
    place after the last one.
    """
    from dataclasses import replace

    from marlin_cli.backend import require_mlx

    require_mlx()
    from marlin_cli.api import load
    from marlin_cli.checkpoints import ImportOptions
    from marlin_cli.commands import label_run
    from marlin_cli.commands.given import check_models
    from marlin_cli.commands.options import bytes_of_argument, dtype_of
    from marlin_cli.commands.texts import Beside, Sources, stream_of, texts_of
    from marlin_cli.continuing_model import ContinuingModel
    from marlin_cli.encoding_model import EncodingModel
    from marlin_cli.engine.characters import AnswerSettings
    from marlin_cli.engine.spans import OUTSIDE

    check_models(command_line, [model])
    sources = Sources(prompt, prompt_file, hex_prompt, prompts)
    beside = Beside(
        second=None if second is None else bytes_of_argument(second),
        question=None if question is None else bytes_of_argument(question),
        choices=tuple(map(bytes_of_argument, choice or [])),
    )
    sources.check()
    loaded = load(
        model,
        device=device,
        activation_bits=activation_bits,
        dtype=dtype_of(dtype),
        options=None if language is None else ImportOptions(language=language),
    )
    assert not isinstance(loaded, ContinuingModel)
    if isinstance(loaded, EncodingModel) and loaded.splits:
        plain = loaded.split_settings
        if window is not None and stride is None and window > 0:
            stride = min(plain.stride_characters, window)
        split = {"window_characters": window, "stride_characters": stride, "most_characters": longest, "threshold": threshold}
        settings = replace(plain, **_given(split))
        if prompts is not None:
            label_run.run_sentences(loaded, texts_of(sources, beside), settings)
            return
        sentences = loaded.sentences(stream_of(sources), settings, where=sources.name)
        if lines:
            label_run.write_lines(sentences, raw=raw)
        else:
            label_run.write_sentences(sentences, {})
        return
    answers = {"best": best, "longest": longest, "window_positions": window, "stride_characters": stride}
    request = label_run.Request(
        best=best,
        threshold=threshold,
        outside=OUTSIDE if outside is None else tuple(outside),
        merge=not no_merge,
        pad_to=pad_to,
        answers=AnswerSettings(**_given(answers)),
        batch_size=batch_size,
    )
    label_run.run(loaded, texts_of(sources, beside, tabs=tabs), request)


def _given(sizes: dict[str, Any]) -> dict[str, Any]:
    return {name: size for name, size in sizes.items() if size is not None}
