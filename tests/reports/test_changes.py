"""Changes between results made up with known noise: what was planted is found, what is noise is not."""

import csv
import io
import json
import math
import os

import numpy as np
import pytest

from marlin_cli.errors import UsageError
from marlin_cli.reports.changes import _student, changes, left_out, paired_ratio, read_result, rendered_changes, table_of_pairs


def document(speed=1.0, bits=1.0, noise=0.01, seed=0, name="m"):
    """A result of 9 repeats whose speeds are `speed` x 100 and whose noise has the given relative width."""
    random = np.random.default_rng(seed)

    def samples(scale):
        return {"samples": list(scale * np.exp(noise * random.standard_normal(9)))}

    return {
        "throughput_settings": {"prompt_bytes": 512},
        "models": [
            {
                "model": name,
                "throughput": {
                    "prefill_bytes_per_second": samples(1000 * speed),
                    "decode_bytes_per_second": samples(100 * speed),
                    "time_to_first_byte_seconds": samples(0.5 / speed),
                },
                "quality": {"all_domains": {"bytes": 1000, "total_bits": 2500.0 * bits}},
            }
        ],
    }


def verdicts(old, new):
    return {change.measure: change.verdict for change in changes(old, new)}


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_down_of_a_tenth_is_flagged(seed):
    found = verdicts(document(seed=seed), document(speed=0.9, seed=seed + 100))
    assert found.pop("bits_per_byte") == "within noise"
    assert set(found.values()) == {"worse"}
    found = verdicts(document(speed=0.9, seed=seed), document(seed=seed + 100))
    assert found["decode_bytes_per_second"] == found["time_to_first_byte_seconds"] == "better"


@pytest.mark.parametrize("seed", range(20))
def test_noise_of_a_hundredth_is_not(seed):
    assert set(verdicts(document(seed=seed), document(seed=seed + 100)).values()) == {"within noise"}


def test_a_tenth_is_seldom_flagged_where_the_repeats_differ_by_more():
    found = [verdicts(document(noise=0.4, seed=seed), document(speed=0.9, noise=0.4, seed=seed + 1000)) for seed in range(200)]
    assert sum(each["decode_bytes_per_second"] == "worse" for each in found) < 0.15 * len(found)


def test_a_loss_of_half_a_percent_is_flagged():
    assert verdicts(document(), document(bits=1.005))["bits_per_byte"] == "worse"
    assert verdicts(document(), document(bits=0.995))["bits_per_byte"] == "better"
    assert verdicts(document(), document(bits=1.0005))["bits_per_byte"] == "within noise"


def test_what_was_not_measured_alike_is_not_compared():
    other = document()
    other["throughput_settings"] = {"prompt_bytes": 64}
    other["models"][0]["quality"]["all_domains"]["bytes"] = 999
    with pytest.raises(UsageError, match="nothing in common but models"):
        verdicts(document(), other)
    with pytest.raises(UsageError, match="no model is in both results; the old one has 'm'"):
        list(changes(document(), document(name="n")))


def test_scores_of_other_windows_are_not_compared():
    long, short = document(), document(bits=1.1)
    long["quality_settings"] = {"corpus": "c", "windowing": {"window_bytes": 2048}, "reference": "full"}
    short["quality_settings"] = {"corpus": "c", "windowing": {"window_bytes": 512}, "reference": None}
    assert "bits_per_byte" not in verdicts(long, short)
    short["quality_settings"]["windowing"] = {"window_bytes": 2048}
    assert verdicts(long, short)["bits_per_byte"] == "worse"


def answering(speed=1.0, bits=1.0):
    """A result of a ByT5, whose repeats are equal."""

    def samples(scale):
        return {"samples": [scale] * 3}

    speeds = [
        {
            "batch_size": size,
            "encoder_bytes_per_second": samples(1000.0),
            "decode_bytes_per_second": samples(100 * speed),
            "time_to_first_byte_seconds": None,
        }
        for size in (1, 8)
    ]
    quality = {"groups": {}, "all_pairs": {"target_bytes": 1000, "total_bits": 900.0 * bits}}
    return {"throughput_settings": None, "models": [{"model": "b", "speeds": speeds, "quality": quality}]}


def test_answering_models_are_compared_by_batch():
    assert verdicts(answering(), answering(speed=0.9, bits=1.005)) == {
        "encoder_bytes_per_second, batch 1": "within noise",
        "decode_bytes_per_second, batch 1": "worse",
        "encoder_bytes_per_second, batch 8": "within noise",
        "decode_bytes_per_second, batch 8": "worse",
        "bits_per_byte": "worse",
    }


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "md"])
def test_changes_are_rendered_whole(form):
    found = list(changes(answering(), answering(speed=2.0)))
    text = rendered_changes(found, form)
    if form == "md":
        assert text.count("| b |") == len(found) and "decode_bytes_per_second, batch 8 | 2.0000 |" in text
        return
    rows = {
        "json": lambda: json.loads(text)["changes"],
        "jsonl": lambda: [json.loads(line) for line in text.splitlines()],
        "csv": lambda: list(csv.DictReader(io.StringIO(text))),
    }[form]()
    assert [row["verdict"] for row in rows] == [change.verdict for change in found]
    assert float(rows[1]["value"]) == pytest.approx(2.0) and rows[1]["measure"] == "decode_bytes_per_second, batch 1"


def test_pairs_cancel_what_slows_both():
    slow = np.array([1.0, 3.0, 1.5, 2.0])
    ratio = paired_ratio(list(100 / slow), list(110 / slow))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    assert paired_ratio([1.0], [2.0]).low == 2.0
    with pytest.raises(UsageError, match="found 1 and 2"):
        paired_ratio([1.0], [1.0, 2.0])


# Of 2^n cases, those with at most b below: two tails of at most 2.5 % each (tables of the sign test).
@pytest.mark.parametrize("count, outside", [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (15, 3), (20, 5)])
def test_the_interval_of_pairs_is_that_of_the_sign_test(count, outside):
    logs = np.arange(count) / 100
    ratio = paired_ratio([1.0] * count, list(np.exp(np.random.default_rng(0).permutation(logs))))
    assert np.log([ratio.low, ratio.value, ratio.high]) == pytest.approx([logs[outside], np.median(logs), logs[-1 - outside]])


def test_many_pairs_are_taken_four_by_four():
    old = [100.0, 100.0, 100.0, 1.0] * 10  # one in four is disturbed, and not the same ones
    new = [1.0, 110.0, 110.0, 110.0] * 10
    ratio = paired_ratio(old, new)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    assert paired_ratio(old[:8], new[:8]).high == pytest.approx(110)  # too few to be pooled


def busy(random, count):
    """Speeds of two equal models in turn on a busy machine: slow spells fall on both, and single runs take times as long."""
    spells = np.repeat((random.random(count // 5 + 1) < 0.3) * random.exponential(0.7, count // 5 + 1), 5)[:count]
    for _ in range(2):
        spikes = (random.random(count) < 0.2) * random.exponential(1.0, count)
        yield 100 / np.exp(0.03 * random.standard_normal(count) + spells + spikes)


@pytest.mark.parametrize("seed", range(5))
def test_pairs_tell_a_tenth_from_nothing_on_a_busy_machine(seed):
    old, new = busy(np.random.default_rng(seed), 110)
    same, slower = paired_ratio(list(old), list(new)), paired_ratio(list(old), list(0.9 * new))
    assert same.value == pytest.approx(1.0, abs=0.05)
    assert slower.value == pytest.approx(0.9, abs=0.05) and slower.high < 1


def test_intervals_of_pairs_miss_seldom():
    random = np.random.default_rng(1)
    found = [paired_ratio(*map(list, busy(random, 40))) for _ in range(400)]
    assert 0.93 < np.mean([ratio.low <= 1 <= ratio.high for ratio in found]) < 0.99


@pytest.mark.parametrize("degrees, point", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (8, 2.306), (30, 2.042)])
def test_points_of_student(degrees, point):
    assert _student(degrees) == pytest.approx(point, rel=5e-3)


def test_a_table_of_pairs_leaves_the_baseline_out():
    both = document()
    both["models"] += document(speed=2.0, name="n")["models"]
    table = table_of_pairs(both, "m")
    assert [row[:3] for row in table.rows][1] == ["n", "decode_bytes_per_second", "2.0000"]
    assert len(table.rows) == 3


@pytest.mark.parametrize("speed, verdict", [(0.9, "worse"), (1.0, "within noise"), (1.01, "within noise"), (1.1, "better")])
def test_pairs_flag_a_tenth_and_not_a_hundredth(speed, verdict):
    both = document()
    both["models"] += document(speed=speed, name="n", seed=1)["models"]
    assert {row[-1] for row in table_of_pairs(both, "m").rows} == {verdict}


def test_the_last_line_of_a_file_is_read(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(document(name="old")) + "\n" + json.dumps(document(name="new")) + "\n")
    assert read_result(file)["models"][0]["model"] == "new"


@pytest.mark.parametrize("models", [[{}], ["m"], [{"model": "m", "throughput": {"a": 1}}], [{"model": "m", "quality": [1]}]])
def test_a_result_that_lacks_numbers_is_refused(models):
    broken = {"models": models, "throughput_settings": {"prompt_bytes": 512}}
    with pytest.raises(UsageError, match="lacks numbers|nothing in common"):
        list(changes(broken, broken))


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", '{"models": 1, "throughput_settings": null}'])
def test_what_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "file").write_text(text)
    with pytest.raises(UsageError, match="no result of bench"):
        read_result(tmp_path / "file")
    with pytest.raises(UsageError, match="no such file"):
        read_result(tmp_path / "missing")


WRONG = [None, True, "x", [], {}, -1.0, 0, math.nan, math.inf, 10**400, 10**4000, [[1]], ["1"], [None], "\x1b[31m"]
PLACES = {
    "models": lambda d, value: d.update(models=value),
    "timing": lambda d, value: d.update(throughput_settings=value),
    "quality settings": lambda d, value: d.update(quality_settings=value),
    "a model": lambda d, value: d.update(models=[value]),
    "a name": lambda d, value: d["models"][0].update(model=value),
    "speeds": lambda d, value: d["models"][0].update(throughput=value),
    "a speed": lambda d, value: d["models"][0]["throughput"].update(decode_bytes_per_second=value),
    "samples": lambda d, value: d["models"][0]["throughput"]["decode_bytes_per_second"].update(samples=value),
    "a sample": lambda d, value: d["models"][0]["throughput"]["decode_bytes_per_second"].update(samples=[1.0, value]),
    "quality": lambda d, value: d["models"][0].update(quality=value),
    "scores": lambda d, value: d["models"][0]["quality"].update(all_domains=value),
    "bits": lambda d, value: d["models"][0]["quality"]["all_domains"].update(total_bits=value),
    "bytes": lambda d, value: d["models"][0]["quality"]["all_domains"].update(bytes=value),
}


@pytest.mark.parametrize("place", PLACES)
def test_any_value_in_any_field_is_compared_or_refused_in_a_line(place, tmp_path):
    good, refused = document(), 0
    for value in WRONG:
        bad = document()
        PLACES[place](bad, value)
        (tmp_path / "bad").write_text(json.dumps(bad) + "\n")
        try:
            found = list(changes(good, read_result(tmp_path / "bad")))
            assert "nan" not in rendered_changes(found, "csv")
        except UsageError as error:
            refused += 1
            assert str(error).isprintable()
            assert "--compare" in str(error)
    assert refused > 0


def test_ratios_that_no_float_holds_are_refused():
    with pytest.raises(UsageError, match="too far apart"):
        list(changes(document(speed=1e-150, noise=0.0), document(speed=1e300, noise=0.0)))


def piped(path):
    os.mkfifo(path)


FILES = {
    "a pipe": (piped, "is a pipe"),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "a line without end": (lambda path: path.write_bytes(b"[" * (17 << 20)), "its last line is longer than"),
    "deep": (lambda path: path.write_bytes(b"[" * 100_000), "no result of bench"),
    "not UTF-8": (lambda path: path.write_bytes(b"\xff\xfe{}"), "no result of bench"),
    "cut": (lambda path: path.write_text(json.dumps(document())[:-20]), "no result of bench"),
    "a list of models": (lambda path: path.write_text('{"models": [7], "throughput_settings": null}'), "lacks numbers"),
}


@pytest.mark.parametrize("hazard", FILES)
def test_files_that_are_none_are_a_line_that_names_them(hazard, tmp_path):
    make, message = FILES[hazard]
    make(tmp_path / "file")
    with pytest.raises(UsageError, match=f"{tmp_path / 'file'}.*{message}"):
        read_result(tmp_path / "file")


def test_the_end_of_a_large_file_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * (17 << 20) + b"\n" + json.dumps(document()).encode() + b"\n\n")
    assert read_result(tmp_path / "file")["models"]


def test_what_is_not_compared_is_told():
    old, new = document(), document()
    assert left_out(old, new) == ""
    new["models"] += document(name="other\x1b")["models"]
    new["throughput_settings"] = {**old["throughput_settings"], "prompt_bytes": 7}
    old["throughput_settings"]["prompt_bytes"] = 5
    assert left_out(old, new) == (
        r"only in the new one: 'other\x1b'; not compared, as the settings differ: prompt_bytes 5 and 7"
    )
