"""`marlin bench --plan`: what models cost by their shape, at contexts and bit widths; the time that reading memory takes,
and the one that this machine's operations predict.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marlin_cli.checkpoints import ImportOptions
    from marlin_cli.prediction.ranks import Held, Link


def show_plan(
    names: Sequence[str],
    contexts: str | None,
    bits: int | None,
    cache_bits: int | tuple[int, int] | None,
    gigabytes_per_second: float | None,
    device: str,
    imports: Mapping[str, "ImportOptions"],
    ranks: int | None = None,
    link: str | None = None,
) -> None:
    """Print a table a model. The bandwidth is measured unless it is given, and then operations are too, where that can be done.

    Raises:
        MarlinError: a model that cannot be read or does not continue bytes, or options that do not fit it.

    Args:
        imports: what models do not say, by their names.
        ranks: what so many make of it is told too.
        link: of the ranks, as `prediction.ranks.parse_link` takes it.
    """
    from marlin_cli import console
    from marlin_cli.checkpoints import read_checkpoint
    from marlin_cli.checkpoints.location import locate_model
    from marlin_cli.commands.options import CACHE_BITS, check_bandwidth, check_width, parse_sizes
    from marlin_cli.engine.cache import CacheBits
    from marlin_cli.errors import UsageError
    from marlin_cli.models import architecture_named, build, settings_for
    from marlin_cli.ops.device import choose_device
    from marlin_cli.prediction.arithmetic import STORED_BITS, costs_of, stored_bits
    from marlin_cli.prediction.bandwidth import measure_bandwidth
    from marlin_cli.prediction.memory import stream_bytes
    from marlin_cli.prediction.prediction import at_bits, layer_shapes, predicted_seconds
    from marlin_cli.prediction.ranks import parse_link
    from marlin_cli.prediction.sizes import bytes_by_part, bytes_in_float32, elements_by_part
    from marlin_cli.text import with_article

    if isinstance(cache_bits, tuple):
        if cache_bits[0] != cache_bits[1]:
            raise UsageError("--plan takes one width for keys and values: --kv-bits")
        cache_bits = cache_bits[0]
    check_bandwidth(gigabytes_per_second)
    check_width("--kv-bits", cache_bits, CACHE_BITS)
    check_width("--bits", bits, sorted(STORED_BITS))
    if link is not None:
        parse_link(link)  # before anything is noted
    plans = []
    for name in names:
        checkpoint = read_checkpoint(locate_model(name), imports.get(name), check_values=False)
        architecture = architecture_named(checkpoint.config, name)
        if architecture.decoding is None:
            raise UsageError(
                f"--plan: {name} is {with_article(architecture.title)}; arithmetic is known of models that continue bytes"
            )
        config = settings_for(checkpoint.config, name)
        # A bandwidth that is given is another machine's; on this one's CPU activations and floats take 32 bits.
        here = gigabytes_per_second is None and (chosen := choose_device(device)).name == "cpu"
        floats = 32 if here else 16
        sizes: dict[str, float] = dict(
            bytes_in_float32(checkpoint.weights, architecture.looked_up) if here else bytes_by_part(checkpoint.weights)
        )
        if bits is not None:
            if checkpoint.quantization is not None:
                raise UsageError(f"--bits: {name} is packed already; leave it out, or name the model it was made from")
            elements = elements_by_part(checkpoint.weights)
            sizes = {part: count * stored_bits(bits) / 8 for part, count in elements.items()}
        lengths = parse_sizes(contexts, "--context") or (config.max_bytes,)
        costs = [costs_of(config, sizes, length, cache_bits or floats, floats) for length in lengths]
        predicted = None
        if here:
            network = build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where=name, dtype=chosen.dtype)
            shapes = layer_shapes(network) if bits is None else at_bits(layer_shapes(network), bits)
            kept = CacheBits(cache_bits or 16, cache_bits or 16)
            predicted = predicted_seconds(config, shapes, lengths, kept)
        shared = None if ranks is None else _held(config, checkpoint.weights, ranks, name)
        held = [stream_bytes(config, length, cache_bits or floats, floats) for length in lengths]
        plans.append((name, costs, predicted, held, sizes, config, shared))
    if gigabytes_per_second is None:
        choose_device(device)
        measured = measure_bandwidth()
        rate = measured.matvec
        console.note(f"measured: copies {measured.copy / 1e9:.1f} GB/s, matrix times vector {rate / 1e9:.1f} GB/s")
    else:
        rate = gigabytes_per_second * 1e9
    for name, costs, predicted, held, sizes, config, shared in plans:
        rows = [
            ["attention, pairs", *(f"{each.attention_pairs:,}" for each in costs)],
            ["of a flat byte model", *(f"{each.flat_attention_pairs:,}" for each in costs)],
            ["ratio", *(f"{each.flat_attention_pairs / each.attention_pairs:.1f}" for each in costs)],
            *(
                [f"{level} cache, bytes", *(f"{each.cache_bytes[level]:,.0f}" for each in costs)]
                for level in costs[0].cache_bytes
            ),
            ["of a flat byte model, 16 bits", *(f"{each.flat_cache_bytes:,.0f}" for each in costs)],
            ["memory, bytes: weights", *(f"{sum(sizes.values()):,.0f}" for _ in costs)],
            ["memory, bytes: a stream", *(f"{each:,.0f}" for each in held)],
            *([f"read a byte: {part}", *(f"{each.read_bytes[part]:,.0f}" for each in costs)] for part in costs[0].read_bytes),
            ["read a byte: all", *(f"{each.read_bytes_total:,.0f}" for each in costs)],
            ["reading a byte takes, us", *(f"{1e6 * each.seconds_per_byte(rate):,.3g}" for each in costs)],
        ]
        if predicted is not None:
            rows += [[f"predicted, us: {part}", *(f"{1e6 * each[part]:,.3g}" for each in predicted)] for part in predicted[0]]
            rows.append(["predicted, us: all", *(f"{1e6 * sum(each.values()):,.3g}" for each in predicted)])
        if ranks is not None:
            seconds = predicted or [{part: size / rate for part, size in each.read_bytes.items()} for each in costs]
            rows += _rows_of_ranks(costs, sizes, seconds, shared, config, ranks, _link(link, slow=here))
        title = f"Plan of {name} at {rate / 1e9:.1f} GB/s"
        console.table(title, ["", *(f"{each.context_bytes:,} bytes" for each in costs)], rows, to_stdout=True)


def _held(config: Any, weights: Any, ranks: int, name: str) -> "Held | None":
    """What a rank holds where all share the model; None, which is said, where so many cannot."""
    from marlin_cli import console
    from marlin_cli.errors import UsageError
    from marlin_cli.prediction.ranks import held_by_one

    try:
        return held_by_one(config, weights, ranks, name)
    except UsageError as error:
        console.note(f"only streams over ranks are told: {error}")
        return None


def _link(given: str | None, *, slow: bool) -> "Link":
    """The link of the ranks: as given, else that of processes on one machine, or of GPUs on one board."""
    from marlin_cli import console
    from marlin_cli.prediction.ranks import parse_link

    if given is None:
        given = "300,1" if slow else "2,100,tree"  # within a launch, see exchange.cuh; 12 by NCCL
        console.note(f"assumed --link {given}: a sum over two ranks takes so many microseconds, and GB/s beyond")
    return parse_link(given)


def _rows_of_ranks(
    costs: Sequence[Any], sizes: Any, seconds: Sequence[Any], shared: "Held | None", config: Any, ranks: int, link: "Link"
) -> list[list[str]]:
    from marlin_cli.prediction.ranks import by_split, by_streams

    ways = {"streams": [by_streams(each, sizes, taken, ranks) for each, taken in zip(costs, seconds, strict=True)]}
    if shared is not None:
        ways[f"--split {shared.part}"] = [
            by_split(each, sizes, taken, shared, config, link) for each, taken in zip(costs, seconds, strict=True)
        ]
    rows = []
    for way, plans in ways.items():
        where = f"{ranks} ranks by {way}"
        rows += [
            [f"{where}: bytes of memory each", *(f"{plan.memory_bytes:,.0f}" for plan in plans)],
            [f"{where}: us a byte", *(f"{1e6 * plan.seconds_per_byte:,.3g}" for plan in plans)],
            [f"{where}: bytes/s of all", *(f"{plan.bytes_per_second:,.0f}" for plan in plans)],
        ]
    return rows
