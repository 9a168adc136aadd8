"""Arms beside each other: steps to a distance against closed forms, and a run inside or outside the seeds' spread."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy.stats import t as student

from scripts import compare
from scripts.compare import Arm, check, missing, reached, read_arms, read_run, steps_to

STEPS = (500, 1000, 2000, 4000, 8000)
SETTINGS = {"lr": 5e-4, "scale": 8.0, "k": 100, "model": "SiT-S/4"}


def write(folder, arm, distances, seed=0, steps=STEPS, **changes):
    """A run's JSON as scripts/miniature.py writes it."""
    curve = [
        {"step": step, "seconds": step / 50, "train_loss": 0.2, "holdout_loss": 0.3}
        | {"held_out": {"fd": fd, "precision": 0.5, "recall": 0.4, "kd": 0.1}, "training": {"fd": fd - 1}}
        for step, fd in zip(steps, distances, strict=True)
    ]
    run = {"format": 1, "dataset": "toy", "arm": arm, "seed": seed, "settings": SETTINGS, "steps": 8000, "curve": curve}
    folder.mkdir(exist_ok=True)
    path = folder / f"{arm}.{seed}+{len(list(folder.iterdir()))}.json"  # names do not matter
    path.write_text(json.dumps(run | changes))
    return path


def power_law(a, b):
    return [a * step**-b for step in STEPS]


def test_steps_to_a_distance_on_a_power_law_are_exact():
    """FD = a·step^−b is a line in both logarithms."""
    distances = np.array(power_law(3000, 0.7))
    for step in (600, 1000, 5555):
        assert steps_to(3000 * step**-0.7, STEPS, distances) == pytest.approx(step)
    assert steps_to(distances[0] + 1, STEPS, distances) == 500
    assert steps_to(distances[-1] - 1e-3, STEPS, distances) is None
    assert steps_to(9, [1, 2, 4], np.array([16.0, 8.0, 12.0])) < 2  # the first time, whatever comes later


def test_ratio_is_the_baselines_steps_over_the_arms(tmp_path):
    """Half the exponent's constant: the arm is where the baseline ends after 8000·4^(−1/0.5) = 500 … steps."""
    write(tmp_path, "label", power_law(1000, 0.5))
    write(tmp_path, "own", power_law(500, 0.5))
    write(tmp_path, "random", power_law(1001, 0.5))
    write(tmp_path, "class-mean", power_law(200, 0.5))
    arms = read_arms(tmp_path)
    assert reached(arms["own"], arms["label"]) == "2,000 (4×)"
    assert reached(arms["random"], arms["label"]) == "not reached in 8,000"
    assert reached(arms["class-mean"], arms["label"]) == "≤ 500 (≥ 16×)"


def test_a_ratio_says_how_far_the_seeds_lie_apart(tmp_path):
    """Constants 600, 450 and 450 around a mean of 500: 8000·(1000/c)² steps fewer; and one that does not arrive."""
    write(tmp_path, "label", power_law(1000, 0.5))
    for seed, constant in enumerate((600, 450, 450)):
        write(tmp_path, "own", power_law(constant, 0.5), seed)
    for seed, constant in enumerate((500, 1100)):
        write(tmp_path, "nearest-10", power_law(constant, 0.5), seed)
    arms = read_arms(tmp_path)
    assert reached(arms["own"], arms["label"]) == "2,000 (4×; 2.8× to 4.9×)"
    assert reached(arms["nearest-10"], arms["label"]) == "5,120 (1.6×; not reached to 4×)"


def test_baselines_that_still_fall_are_called_unfinished(tmp_path):
    write(tmp_path, "label", [9, 8, 7, 5, 4.01])
    write(tmp_path, "none", [9, 8, 7, 5, 3.99])
    write(tmp_path, "label-align", [9, 8, 7], steps=(500, 1000, 8000))
    arms = read_arms(tmp_path)
    assert compare.unfinished(arms["label"]) is None
    assert (
        compare.unfinished(arms["none"])
        == "The baseline none is unfinished: its FD falls by 20% from 4,000 to 8,000 steps"
    )
    assert (
        compare.unfinished(arms["label-align"])
        == "The baseline label-align was not scored at 4,000 steps, half of its last"
    )


def test_the_mean_of_the_seeds_counts_at_steps_that_all_have(tmp_path):
    write(tmp_path, "none", [9, 7, 5], seed=0, steps=(500, 1000, 2000))
    write(tmp_path, "none", [11, 9, 7, 1], seed=1, steps=(500, 1000, 2000, 4000))
    unscored = json.loads(write(tmp_path / "x", "none", [9, 9, 9], seed=2, steps=(500, 1000, 2000)).read_text())
    unscored["curve"].insert(1, {"step": 700, "seconds": 14.0, "holdout_loss": 0.3})
    (tmp_path / "third.json").write_text(json.dumps(unscored))
    (arm,) = read_arms(tmp_path).values()
    assert arm.steps == [500, 1000, 2000]
    assert arm.final == 7
    assert arm.distances.tolist() == [[9, 11, 9], [7, 9, 9], [5, 7, 9]]


def test_command_writes_figure_and_table(tmp_path, capsys):
    copies = {"near_copies": 0.02, "near_copies_held_out": 0.01, "excess": 0.01, "standard_error": 0.001}
    copies |= {"authenticity": 0.5, "authenticity_held_out": 0.51}
    variants = {"guided-1.5": {"held_out": {"fd": 12.5, "precision": 0.61, "recall": 0.33}}}
    for seed, shift in enumerate((-3, 0, 3)):
        write(tmp_path, "label", [100, 80, 60, 40, 30 + shift], seed)
    write(tmp_path, "nearest-10", [90, 30, 20, 15, 12], copies={"latents": copies}, variants=variants)
    write(tmp_path, "rows-10", [95, 30.0], steps=(500, 3000), images_per_second=1000.0)
    write(tmp_path, "random", [95, 90.0], steps=(500, 3000), images_per_second=1201.0)
    rows = {"rows": {"random training images": {"num_images": 10_000, "held_out": {"fd": 2.25}}}}
    (tmp_path / "controls.json").write_text(json.dumps(rows))
    compare.main([str(tmp_path)])
    page = (tmp_path / "table.md").read_text()
    assert page in capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    header, _, label, nearest, _, rows = lines[:6]
    assert header[:9] == [
        "arm",
        "seeds",
        "last step",
        *(f"{step} steps" for step in ("500", "1,000", "2,000", "3,000", "4,000", "8,000")),
    ]
    entries = dict(zip(header, label, strict=True))
    assert (entries["seeds"], entries["8,000 steps"], entries["range of the last"]) == ("3", "30", "27 to 33")
    assert entries["3,000 steps"] == entries["steps to label's 30"] == ""
    assert dict(zip(header, nearest, strict=True))["steps to label's 30"] == "1,000 (8×)"
    assert dict(zip(header, rows, strict=True))["steps to label's 30"] == "3,000 (2.7×)"
    assert "FD 2.25" in page
    assert "Speeds differ, 1,000 to 1,201 images/s" in page
    assert "Missing: none (0 of 3 seeds), label-align (0 of 3 seeds), nearest-10 (1 of 3 seeds)" in page
    assert ["nearest-10", "guided-1.5", "1", "12.5", "0.61", "0.33"] in lines
    assert ["nearest-10", "100", "latents", "2.00%", "1.00%", "+1.00% ± 0.10%", "50.0%", "51.0%"] in lines
    figure = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).reshape(-1, 3)
    pixels = [(figure == colour).all(1).sum() for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44))]
    assert 0 < pixels[2] < min(pixels[:2])  # a dashed line beside the primary arms' full ones


def test_a_run_alone_is_enough(tmp_path):
    write(tmp_path, "rows-10", [95], steps=(500,), images_per_second=1000.0)
    compare.main([str(tmp_path)])
    assert "images/s" not in (tmp_path / "table.md").read_text()
    assert (tmp_path / "curve.png").is_file()
    assert len(missing(read_arms(tmp_path))) == len(compare.PRIMARY)


def test_check_is_three_standard_deviations(tmp_path, capsys):
    """Three seeds 9, 10, 11: 10 ± 3; by Student's distribution one run in eight of that kind lies outside."""
    for seed, final in enumerate((9, 10, 11)):
        write(tmp_path / "runs", "own", [100, 80, 60, 40, final], seed)
    assert 2 * student.sf(3 / math.sqrt(4 / 3), 2) == pytest.approx(1 / 8, abs=0.005)
    reach = 3
    results = {}
    for name, final in (("in", 10 + reach - 0.001), ("out", 10 + reach + 0.001), ("low", 10 - reach - 0.001)):
        path = write(tmp_path / name, "own", [100, 80, 60, 40, final], 7)
        with pytest.raises(SystemExit) as status:
            compare.main([str(tmp_path / "runs"), "--check", str(path)])
        results[name] = bool(status.value.code)
    assert results == {"in": False, "out": True, "low": True}
    printed = capsys.readouterr().out
    assert "inside the spread at step 8,000" in printed
    assert "7 to 13" in printed
    arms = read_arms(tmp_path / "runs")
    early = write(tmp_path / "early", "own", [101, 80], 7, steps=(500, 1000))  # 500 is outside, the last one decides
    assert check(read_run(early), early, arms)
    assert not (tmp_path / "runs" / "table.md").exists()


def test_what_does_not_compare_is_refused(tmp_path):
    for seed in (0, 1):
        write(tmp_path / "runs", "own", [5] * 5, seed)
    write(tmp_path / "runs", "none", [5] * 5)
    arms = read_arms(tmp_path / "runs")

    def refused(text, arm="own", **changes):
        path = write(tmp_path / "mine", arm, changes.pop("distances", [5] * 5), **changes)
        with pytest.raises(ValueError, match=text):
            check(read_run(path), path, arms)

    refused("no runs of arm 'label' to compare with, only of none, own", arm="label")
    refused("arm 'own': lr: 0.1 and 0.0005", settings=SETTINGS | {"lr": 0.1})
    refused("one committed seed of arm 'none'", arm="none")
    refused(r"scored at steps \[3\], the committed runs at \[500", distances=[5], steps=(3,))
    (tmp_path / "mine" / "other.json").write_text('{"metrics": {}}')
    with pytest.raises(ValueError, match=r"no run of scripts\.miniature: it has no arm, seed, dataset"):
        read_run(tmp_path / "mine" / "other.json")


def test_folders_that_do_not_hold_arms_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no runs in it"):
        read_arms(tmp_path)
    first = write(tmp_path, "own", [5] * 5)
    again = write(tmp_path, "own", [5] * 5)
    with pytest.raises(ValueError, match="two runs of arm 'own' have one seed"):
        read_arms(tmp_path)
    again.unlink()
    other = write(tmp_path, "own", [5] * 5, seed=1, settings=SETTINGS | {"k": 7})
    with pytest.raises(ValueError, match="other settings, k: 7 and 100"):
        read_arms(tmp_path)
    other.unlink()
    write(tmp_path, "own", [5], seed=1, steps=(3,))
    with pytest.raises(ValueError, match="have no step in common"):
        read_arms(tmp_path)
    unscored = json.loads(first.read_text()) | {"curve": [{"step": 1, "holdout_loss": 0.1}]}
    first.write_text(json.dumps(unscored))
    with pytest.raises(ValueError, match="no point of its curve was scored"):
        read_arms(tmp_path)


def test_arm_reads_what_is_not_given_as_nan():
    point = {"step": 1, "held_out": {"fd": 3.0}}
    arm = Arm("own", [{"curve": [point]}])
    assert arm.final == 3
    assert np.isnan(arm.values("held_out", "precision")).all()
    assert np.isnan(arm.values("seconds")).all()
