"""Where the result of `marlin bench` goes: tables on stdout or another form, a page, a picture, a file of results."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlin_cli import console
from marlin_cli.bench.answering_result import AnsweringReport
from marlin_cli.bench.encoding_result import EncodingReport
from marlin_cli.bench.result import Report
from marlin_cli.checkpoints import ImportOptions
from marlin_cli.commands.bench_format import Format
from marlin_cli.commands.bench_pictures import Pictures
from marlin_cli.errors import UsageError
from marlin_cli.reports.forms import Table
from marlin_cli.writing import check_output_file, writing


@dataclass(frozen=True)
class Output:
    """What is written, and where."""

    form: Format
    target: Path | None  # None: stdout
    pictures: Pictures
    save: Path | None  # a line of JSON is appended to it

    @classmethod
    def checked(
        cls,
        given: Format | None,
        target: str | None,
        page: str | None,
        figure: str | None,
        save: str | None,
        charts: Sequence[str] = (),
    ) -> "Output":
        """The options, refused before anything is measured.

        Raises:
            OutputError: no folder to write in.
            UsageError: a table for a file, or a picture of an unknown kind or without matplotlib.
        """
        file, results = None if target is None else Path(target), None if save is None else Path(save)
        form = _format_of(given, file)
        for path in (file, results):
            if path is not None:
                check_output_file(path)
        return cls(form, file, Pictures.checked(page, figure, charts), results)

    def write(
        self,
        report: Report | AnsweringReport | EncodingReport,
        models: Sequence[str],
        rendered: Callable[[str], str],
        imports: Mapping[str, ImportOptions],
    ) -> None:
        """Write the pictures and the file of results, where they are asked for.

        Args:
            models: names or paths of the models, as `report.models` has them.
            rendered: the report in a form, by its name.
            imports: what was said of models that do not say all, by their names.
        """
        self.pictures.write(json.loads(rendered("json")))
        if self.save is not None:
            from marlin_cli.reports.results import append_result

            append_result(self.save, report, models, imports)
            console.note(f"added to {self.save}")

    def deliver(self, tables: Sequence[Table], rendered: Callable[[str], str]) -> None:
        """Tables to stdout, or another form to stdout or a file."""
        if self.form is Format.table:
            for table in tables:
                console.table(table.title, table.columns, table.rows, to_stdout=True)
            return
        text = rendered(self.form.value)
        if self.target is None:
            print(text)
            return
        with writing(self.target) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        console.note(f"wrote {self.target}")


def compare_results(old: str, new: str, output: Output) -> None:
    """What changed between two files of results."""
    from marlin_cli.reports.changes import changes, left_out, read_result, rendered_changes, table_of_changes

    before, after = read_result(Path(old)), read_result(Path(new))
    if before.get("machine") != after.get("machine"):
        console.note("the results are of different machines, devices or versions")
    found = list(changes(before, after))
    if said := left_out(before, after):
        console.note(said)
    output.deliver([table_of_changes(found)], lambda form: rendered_changes(found, form))


def show_kernels(
    device: str,
    models: Sequence[str],
    activation_bits: int,
    imports: Mapping[str, ImportOptions],
    kv_bits: int | tuple[int, int] | None = None,
) -> None:
    """Each operation, and what runs it on the device; of each model, where CPU kernels are, how its layers are multiplied."""
    from marlin_cli.ops.cpu import kernels
    from marlin_cli.ops.device import choose_device
    from marlin_cli.ops.dispatch import choices

    chosen = choose_device(device)
    rows = [[choice.op, choice.twin, choice.reason] for choice in choices()]
    console.table(f"kernels on {chosen.name} ({chosen.reason})", ["operation", "kernel", "why"], rows, to_stdout=True)
    if chosen.name == "cpu" and kernels()[0] is not None:
        for model in models:
            _show_layers(model, activation_bits, imports.get(model))
    if chosen.name == "cuda":
        _show_whole(models, imports, kv_bits)
        _show_products(models, imports)


def _show_whole(models: Sequence[str], imports: Mapping[str, ImportOptions], kv_bits: int | tuple[int, int] | None) -> None:
    """How each model decodes on an NVIDIA GPU, and why, by streams side by side."""
    from marlin_cli.api import load
    from marlin_cli.engine import cuda_answers, cuda_patches
    from marlin_cli.models import Capability, Reading, architecture_of
    from marlin_cli.ops.dispatch import by_operations

    rows = []
    for model in models:
        loaded: Any = load(model, device="cuda", options=imports.get(model), kv_bits=kv_bits)
        network = loaded.network
        architecture = architecture_of(network)
        by_patches = architecture.continuing is not None and architecture.continuing.reading is Reading.PATCHES
        answers = architecture.capability is Capability.ANSWERS and network.config.decoder_layers
        for streams in (1, 16, 64):
            why: str | None = "byte by byte: no kernel takes this architecture whole"
            if by_operations():
                why = "MARLIN_PATCHES=operations"
            elif by_patches:
                why = cuda_patches.why_operations(network, streams, loaded.cache_bits)
            elif answers:
                why = cuda_answers.why_operations(network, 16, streams)
            rows.append(
                [model, str(streams), "operation by operation" if why else "whole", why or "the kernels know every part"]
            )
    if rows:
        console.table("decoding", ["model", "streams", "path", "why"], rows, to_stdout=True)


def _show_products(models: Sequence[str], imports: Mapping[str, ImportOptions]) -> None:
    """How the packed layers of each model are multiplied on an NVIDIA GPU, and why, by rows at once."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from marlin_cli.api import load
    from marlin_cli.models import linear_layers
    from marlin_cli.ops import QuantizedLinear
    from marlin_cli.ops.cuda import product_way
    from marlin_cli.quantization.formats import format_of

    rows = []
    for model in models:
        network: Any = load(model, device="cuda", options=imports.get(model)).network
        dtype = next(each.dtype for _, each in tree_flatten(network.parameters()) if mx.issubdtype(each.dtype, mx.floating))
        seen = set()
        for layer in linear_layers(network).values():
            if not isinstance(layer, QuantizedLinear):
                continue
            height, width = layer["weight"].shape[0], layer["weight"].shape[1] * 32 // layer.bits
            kind = format_of(layer.mode, layer.bits).name
            if (height, width, kind) in seen:
                continue
            seen.add((height, width, kind))
            for count in (1, 8, 32, 64, 512):
                x = mx.zeros((count, width), dtype=dtype)
                arrays = x, layer["weight"], layer["scales"], layer.get("biases")
                way, why = product_way(*arrays, group_size=layer.group_size, bits=layer.bits, mode=layer.mode)
                rows.append([model, kind, f"{height} x {width}", str(count), way, why])
    if rows:
        console.table("products", ["model", "format", "layer", "rows", "way", "why"], rows, to_stdout=True)


def _show_layers(model: str, activation_bits: int, options: ImportOptions | None) -> None:
    from marlin_cli.api import load
    from marlin_cli.prediction.bandwidth import measure_bandwidth
    from marlin_cli.prediction.layer_ways import ROWS, layer_ways
    from marlin_cli.prediction.prediction import layer_shapes

    shapes = layer_shapes(load(model, device="cpu", activation_bits=activation_bits, options=options).network)
    rows = [
        [
            f"{found.shape.path}{f' and {found.layers - 1} more' if found.layers > 1 else ''}",
            f"{found.shape.columns} x {found.shape.depth}",
            found.shape.format or "float32",
            *found.ways,
            f"{found.bytes_a_second / 1e9:.1f} GB/s",
            f"{100 * found.share:.0f} %",
        ]
        for found in layer_ways(shapes, measure_bandwidth())
    ]
    columns = [
        "layers",
        "shape",
        "weights",
        *(f"{count} row{'s' if count > 1 else ''}" for count in ROWS),
        "one row reads",
        "of a copy",
    ]
    console.table(f"products of {model}", columns, rows, to_stdout=True)


def _format_of(given: Format | None, target: Path | None) -> Format:
    """The format asked for, by name or by the suffix of the output file."""
    if target is None:
        return given or Format.table
    suffix = target.suffix.removeprefix(".")
    form = given or (Format(suffix) if suffix in Format.__members__ else Format.table)
    if form is Format.table:
        raise UsageError(f"--output {target}: a table is for the terminal; add --format json, jsonl, csv or md")
    return form
