"""Figures in the tables of the READMEs are those of the records they link, and every record names what made it."""

import json
import re
from pathlib import Path

import pytest

UNITS = {  # of a printed figure: the numbers of a record that it may be, and what they are multiplied by
    "images/s": {r"/(search_)?images_per_second(_at_250)?$": 1},
    "TFLOP/s": {r"tflops$": 1},
    "GB": {r"_gb$": 1},
    "s": {r"/(seconds|total|search and update|flash_kmeans_iteration)$": 1},
    "ms": {r"/ms/[^/]+$": 1, r"/seconds_a_step$": 1000},
    "%": {r"/(search_)?share\w*$": 100},
}
SIZES = ("batch", "micro_batch", "k", "images")  # of a row of a record; one of them may be the name of a column
SPELT = {"images/s": "images/s", "GB": "GB", "seconds": "s", "milliseconds": "ms"}  # units in a row's or table's name


def numbers(value, name=""):
    """(path, number) of everything in a record, sizes in the path, and two times that are printed as one figure."""
    if isinstance(value, dict):
        name += "".join(f"@{value[size]}@" for size in SIZES if size in value)
        for key, item in value.items():
            yield from numbers(item, f"{name}/{key}")
        if {"search", "updates"} <= value.keys():
            yield f"{name}/search and update", value["search"] + value["updates"][0]
        if {"batch", "evaluations_per_second"} <= value.keys():
            yield f"{name}/seconds_a_step", value["batch"] / value["evaluations_per_second"]
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item, name)
    elif isinstance(value, int | float):
        yield name, value


def recorded(printed, unit, column, records):
    """The numbers of the records that are printed like this, of the size that the column names if it ends in one."""
    half = 0.5 * 10 ** -len(printed.partition(".")[2]) * (1 + 1e-9)
    size = re.sub(r"^.*?([\d,]*)$", r"@\1@", column).replace(",", "")
    found = [
        factor * number
        for record in records
        for path, number in numbers(record)
        for pattern, factor in UNITS[unit].items()
        if re.search(pattern, path) and (size in path or size == "@@")
    ]
    return [number for number in found if abs(number - float(printed.replace(",", ""))) <= half]


def rows(text):
    """(header, cells) of every row of every table."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        header, _, *body = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
        yield from ((header, cells) for cells in body)


def figures(header, cells):
    """(number, unit, column) of a row: with the unit written behind it, or in the name of the row or the table."""
    named = [SPELT[word] for word in re.findall("|".join(SPELT), f"{header[0]} {cells[0]}")]
    for name, cell in list(zip(header, cells, strict=True))[1:]:
        for number, unit, percent in re.findall(r"(\d[\d,]*(?:\.\d+)?)(?: (images/s|TFLOP/s|GB|ms|s)\b|(%))", cell):
            yield number, unit or percent, name
        if re.fullmatch(r"[\d.]+", cell) and name != "ratio":
            yield cell, named[-1], name


@pytest.mark.parametrize(("page", "least"), [("README.md", 40), ("benchmarks/README.md", 166)])
def test_figures_are_those_of_the_records_linked_beside_them(root, page, least):
    found = 0
    for header, cells in rows((root / page).read_text()):
        links = re.findall(r"\(((?:benchmarks/)?results/[\w-]+\.json)\)", cells[-1])
        records = [json.loads(((root / page).parent / link).read_text()) for link in links]
        of = {}  # column: what the record has for its last figure, which is the one beside the reference
        for number, unit, column in figures(header, cells) if links else ():
            of[column] = recorded(number, unit, column, records)
            assert of[column], f"{page}, {cells[0]}: {number} {unit} is not in {', '.join(links)}"
            found += 1
        ratio = dict(zip(header, cells, strict=True)).get("ratio") if links else None
        if ratio:
            pairs = [(ours / theirs, theirs / ours) for ours in of["ours"] for theirs in of["reference"]]
            assert any(ratio == f"{value:.1f}" for pair in pairs for value in pair), f"{cells[0]}: {ratio}"
            found += 1
    assert found >= least


def test_memory_within_22_gib_stands_stage_by_stage(root):
    stages = {}
    for name in ("cards-h200", "cards-train-h200"):  # in this order: the later run of a stage counts
        record = json.loads((root / f"benchmarks/results/{name}.json").read_text())
        stages |= {stage["stage"]: stage for stage in record["stages"]}
    assert not any(stage["status"] for stage in stages.values())
    quoted = [row for row in rows((root / "benchmarks/README.md").read_text()) if row[0][0] == "22 GiB a process"]
    assert [cells[0] for _, cells in quoted] == ["peak GB", "reserved GB"]
    for (header, cells), key in zip(quoted, ("peak_gb", "reserved_gb"), strict=True):
        assert len(header) == 2 + len(stages)
        for stage, cell in zip(stages.values(), cells[1:], strict=False):
            assert abs(float(cell) - stage[key]) <= 0.05 + 1e-9, (stage["stage"], key)


def made(record):
    """(command, date, device) of every run in a record."""
    facts = record | record.get("provenance", {})
    for run in [facts, *(facts | part for part in record.values() if isinstance(part, dict) and "command" in part)]:
        for command in [run["command"]] if "command" in run else run["commands"]:
            yield bare(command if isinstance(command, str) else " ".join(command)), run["date"][:10], run["device"]


def bare(command):
    """A command from its module on, but for where it writes to."""
    return re.sub(r"^.*-m benchmarks\.|\.py(?= )| --(out|work) \S+", "", command)


def test_commands_and_dates_are_those_of_the_records(root):
    text = (root / "benchmarks/README.md").read_text()
    printed = re.findall(r"^# ([\w-]+\.json), ([\d-]+)(, CPU)?(?::.*)?\n(.*)$", text, re.M)
    assert len(printed) == len(re.findall(r"\.json, 20", text))
    for name, date, cpu, command in printed:
        runs = list(made(json.loads((root / "benchmarks/results" / name).read_text())))
        of_that_day = [words for words, day, device in runs if day == date and ("H200" in device) != bool(cpu)]
        assert bare(command) in of_that_day, f"{name}: {command}"
    assert {name for name, *_ in printed} == {path.name for path in (root / "benchmarks/results").iterdir()}


def test_records_say_how_they_came_about(root):
    for path in (root / "benchmarks/results").glob("*.json"):
        record = json.loads(path.read_text())
        facts = record | record.get("provenance", {})
        assert re.match(r"2\.\d+", facts["versions"]["torch"]), path
        assert list(made(record)), path
        assert not re.search(r"/(tmp|home|work|root)\b", path.read_text()), path


def test_every_benchmark_is_introduced(root):
    text = (root / "benchmarks/README.md").read_text()
    for path in (root / "benchmarks").glob("*.py"):
        assert f"`{path.stem}`" in text or path.name == "__init__.py", path
    for stem in re.findall(r"^\| `(\w+)` \|", text, re.M):
        assert Path(root / "benchmarks" / f"{stem}.py").is_file(), stem
