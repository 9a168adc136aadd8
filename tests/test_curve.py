"""Results of the evaluator as a table and over training steps; a damaged one ends in a line that names its file."""

import copy
import json

import numpy as np
import pytest
from PIL import Image

from memory.command import named
from scripts import curve, table

RESULT = {
    "metrics": {"FD-toy@8": 12.3456, "Precision-toy@8": 0.5},
    "num_samples": 5_000,
    "protocol": "5,000 images, euler 50",
    "samples": [{"path": "samples.npz", "made": {"settings": {"training_steps": 1_000}}}],
    "reference": {"path": "data/holdout", "sha256": "0123456789abcdef"},
    "network": {"name": "toy@8"},
    "same_family_as_snippets": False,
}


def write(folder, name, steps, **changes):
    result = copy.deepcopy(RESULT) | changes
    result["samples"][0]["made"]["settings"]["training_steps"] = steps
    (folder / name).write_text(json.dumps(result))


def cells(page):
    """The rows of a Markdown table without its heading."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()[2:]]


def test_results_are_grouped_by_protocol_and_ordered_by_steps(tmp_path, capsys):
    write(tmp_path, "a.json", 2_000, metrics={"FD-toy@8": 3.0})
    write(tmp_path, "b.json", 1_000)
    write(tmp_path, "c.json", 3_000, num_samples=50, protocol="50 images, euler 50")
    write(tmp_path, "published.json", None)  # which does not say how long it was trained
    (tmp_path / "controls.json").write_text(json.dumps({"samples": {"path": "samples.npz", "made": {}}, "rows": {}}))
    curve.main([str(tmp_path)])
    parts = capsys.readouterr().out.split("\n\n")
    assert parts[0] == "5,000 images, euler 50, against holdout (sha256 0123456789ab), toy@8"
    assert cells(parts[1]) == [["1,000", "12.35", "0.5"], ["2,000", "3", ""]]
    assert parts[2].startswith("50 images, euler 50")
    assert cells(parts[3]) == [["3,000", "12.35", "0.5"]]
    assert parts[4] == f"wrote {tmp_path / 'curve.png'}\n"
    assert np.asarray(Image.open(tmp_path / "curve.png")).std() > 0


def test_a_row_for_each_result(tmp_path, capsys):
    write(tmp_path, "one.json", 1)
    table.main([str(tmp_path / "one.json")] * 2)
    assert cells(capsys.readouterr().out) == [["one", "5,000", "12.35", "0.5"]] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((table, "nowhere.json"), "nowhere.json does not exist: evaluations.evaluator writes such files"),
        ((table, "empty.json"), "empty.json is no result of evaluations.evaluator: it has no metrics"),
        ((curve, "."), "no results of samples that say how long their network was trained; first run `bash scripts"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, words, message):
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        words[0].main([str(tmp_path / words[1])])


def damages(value, replacement):
    """Every copy of a structure in which one value is replaced, or with `...` left out."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            changed = copy.copy(value)
            if replacement is ...:
                del changed[key]
            else:
                changed[key] = replacement
            yield changed
            for part in damages(value[key], replacement):
                changed = copy.copy(value)
                changed[key] = part
                yield changed


def refusal(command, path):
    """What a command raises, or None."""
    try:
        command.main([str(path)])
    except Exception as error:
        return error


@pytest.mark.parametrize("replacement", [..., None, "text", 7, [], {}, [3], {"key": None}], ids=str)
@pytest.mark.parametrize("command", [table, curve])
def test_a_damaged_result_is_named(tmp_path, command, replacement, monkeypatch):
    """Whatever is wrong in it; what a command does not read may be anything."""
    monkeypatch.setattr(curve, "draw", lambda *_: None)
    path, errors = tmp_path / "result.json", []
    for damaged in damages(RESULT, replacement):
        path.write_text(json.dumps(damaged))
        errors.append(refusal(command, path if command is table else tmp_path))
    errors = [error for error in errors if error]
    assert errors
    for error in errors:
        assert named(error), repr(error)
        assert "result.json" in str(error) or "no results of samples" in str(error)
