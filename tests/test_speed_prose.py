"""Speeds, hours and memory in sentences and in the recipes' heads follow from the records of benchmarks."""

import json
import re
from datetime import datetime

import pytest


@pytest.fixture
def record(root):
    return lambda name: json.loads((root / f"benchmarks/results/{name}.json").read_text())


@pytest.fixture
def prose(root):
    """The text of a page, or of a script's head, in one line."""
    return lambda page: " ".join(re.sub(r"^# +", "", (root / page).read_text(), flags=re.M).split())


def number(printed):
    return float(printed.replace(",", ""))


def later(first, second):
    """Hours between two records."""
    dates = [datetime.fromisoformat(one["date"]) for one in (first, second)]
    return (dates[1] - dates[0]).total_seconds() / 3600


def test_sampling_by_the_whole_command(record, prose):
    readme, page = prose("README.md"), prose("benchmarks/README.md")
    new, growth = record("sample-h200"), record("sample-growth-h200")
    (first, second), (row,), rows = new["commands"], new["rows"], growth["rows"]
    rate, burst = first["images_per_second"], row["images_per_second_at_250"]
    missed = f"{1 - rate / 9:.0%}"
    assert f"which the {rate:.2f} of the whole command over {first['images']:,} images miss by {missed}" in page
    assert f"9 in sampling by the whole command (missed by {missed})" in readme
    assert f"would do {burst:.2f} in the same run, {row['share_of_ceiling']:.0%} of the ceiling" in page
    seconds = first["images"] / burst, first["images"] / rate
    assert f"2,048 images in {seconds[0]:.1f} s, for which the command took {seconds[1]:.1f}." in page
    started, again = first["startup_seconds"], second["startup_seconds"]
    assert (
        f"takes {started:.0f} s to start and has its first 256 images after {first['first_images_seconds']:.0f}" in page
    )
    assert f"a second start takes {again:.0f} s" in page
    same = next(one for one in rows if one["batch"] == 256)
    before, now = same["evaluations_per_second"], row["evaluations_per_second"]
    assert f"The {same['images_per_second_at_250']:.1f} of the tables" in page
    assert round(later(growth, new)) == 9  # "nine hours before"
    assert f"at {before:,.0f} evaluations/s instead of {now:,.0f} (" in page
    head, ode = prose("scripts/sample-gmem-xl.sh"), prose("scripts/sample-gmem-xl-ode.sh")
    (took,) = re.findall(rf"Time {rate:.2f} images/s .* 50,000 / {rate:.2f} = ([\d,]+) s = 1\.7 hours", head)
    assert number(took) == pytest.approx(50_000 / round(rate, 2), abs=5)
    assert f"{50_000 / rate / 3600:.1f}" == "1.7"
    assert f"eight: {50_000 / rate / 8 / 60:.0f} minutes" in head
    assert f"{took} s · 50 / 250 = {50_000 / rate / 5 / 60:.0f} minutes" in ode
    assert f"Memory {first['peak_gb']:.1f} GB on one H200" in head
    assert "| 1.7 h | 0.2 h |" in readme


def test_an_xl_with_alignment_just_fits_22_gib_with_its_grid(record, prose):
    (stage,) = record("cards-train-h200")["stages"]
    (less,) = [one for one in record("cards-h200")["stages"] if one["stage"] == "train-checkpointed"]
    (first,) = [one for one in record("cards-h200")["stages"] if one["stage"] == "train"]
    assert (stage["status"], stage["grids"], first["status"]) == (0, 1, 2)
    limit = record("cards-train-h200")["limit_gib"] * 2**30 / 1e9
    peak, held = f"{stage['peak_gb']:.1f}", f"{stage['reserved_gb']:.1f}"
    assert f"with its grid of samples: {peak} GB, and {held} of the {limit:.1f} as reserved" in prose("README.md")
    assert "here it was drawn ([json](results/cards-train-h200.json))" in prose("benchmarks/README.md")
    head = prose("scripts/train-gmem-xl.sh")
    assert f"{limit:.1f} GB, it took {less['peak_gb']:.1f} GB at most, without the flag {peak} (" in head
