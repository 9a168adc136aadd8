"""Runs of the miniature judged: steps to a distance against closed forms, and each of the protocol's conditions."""

import json

import numpy as np
import pytest

from scripts import arms as known
from scripts.arms import (
    Arm,
    common_step,
    missing,
    over_each,
    rates,
    ratio_of,
    reach,
    read_arms,
    read_run,
    steps_to,
    targets,
)
from scripts.verdict import conditions, flattening, sanity, verdict

STEPS = (500, 1000, 2000, 4000, 8000)
SETTINGS = {"lr": 5e-4, "scale": 8.0, "k": 100, "model": "SiT-S/4"}
FLAT = (16, 8, 4, 2.1, 2)  # of a baseline that has flattened


def write(folder, arm, distances, seed=0, steps=STEPS, loss=0.3, training=None, **changes):
    """A run's JSON as scripts/miniature.py writes it."""
    curve = [
        {"step": step, "seconds": step / 50, "images": 256 * step, "train_loss": 0.2, "holdout_loss": loss}
        | {"held_out": {"fd": fd, "precision": 0.5, "recall": 0.4, "kd": 0.1}}
        | {"training": {"fd": fd - 0.5 if training is None else training, "precision": 0.6, "recall": 0.7, "kd": 0.1}}
        for step, fd in zip(steps, distances, strict=True)
    ]
    run = {"format": 1, "dataset": "toy", "arm": arm, "seed": seed, "settings": SETTINGS, "steps": steps[-1]}
    folder.mkdir(exist_ok=True)
    path = folder / f"{arm}.{seed}+{len(list(folder.iterdir()))}.json"  # names do not matter
    path.write_text(json.dumps(run | {"curve": curve} | changes))
    return path


def made_on(date, device="NVIDIA H200", torch="2.11.0"):
    """What a log says of its making."""
    return {"made": {"date": date, "device": device, "versions": {"python": "3.12", "torch": torch}}}


def power_law(a, b, steps=STEPS):
    return [a * step**-b for step in steps]


def audit(*excesses):
    """The copy audit of a run, in one space for each excess."""
    rest = {"near_copies": 0.02, "near_copies_held_out": 0.01, "standard_error": 0.001}
    rest |= {"authenticity": 0.5, "authenticity_held_out": 0.51}
    names = ("regnetx_002@64", "latents")
    return {name: rest | {"excess": excess} for name, excess in zip(names, excesses, strict=False)}


def faster(factor, steps=STEPS):
    """A curve that is at FLAT's last distance, 2, after 8,000 steps divided by a factor."""
    return power_law(16_000 / factor, 1, steps)


def test_steps_to_a_distance_on_a_power_law_are_exact():
    """FD = a·step^−b is a line in both logarithms."""
    distances = np.array(power_law(3000, 0.7))
    for step in (600, 1000, 5555):
        assert steps_to(3000 * step**-0.7, STEPS, distances) == pytest.approx(step)
    assert steps_to(distances[0] + 1, STEPS, distances) == 500
    assert steps_to(distances[-1] - 1e-3, STEPS, distances) is None
    assert steps_to(9, [1, 2, 4], np.array([16.0, 8.0, 12.0])) < 2  # the first time, whatever comes later
    assert steps_to(16, [1, 2, 4], np.array([16.0, 20.0, 8.0])) == 1


def test_ratios_of_mean_and_seeds(tmp_path):
    """16,000/(factor·step) reaches 2 after 8,000/factor steps; the mean of two curves is that of the mean 1/factor."""
    write(tmp_path, "label", FLAT)
    for seed, factor in enumerate((2.5, 0.9, 100)):
        write(tmp_path, "own", faster(factor), seed)
    arms = read_arms(tmp_path)
    mean, seeds = reach(arms["own"], targets(arms)["label"])
    assert mean.ratio == pytest.approx(3 / (1 / 2.5 + 1 / 0.9 + 1 / 100))
    assert [seed.ratio for seed in seeds] == pytest.approx([2.5, 0, 16])  # 16 is the first point's, a bound
    assert [seed.steps for seed in seeds] == [pytest.approx(3200), None, 500]
    assert [seed.at_once for seed in seeds] == [False, False, True]
    assert [ratio_of(seed) for seed in seeds] == ["2.5×", "not reached", "≥ 16×"]


def test_a_baseline_that_rises_again_had_its_last_distance_sooner(tmp_path):
    """16,000/step is at 4 after 4,000 steps; what reaches that after 2,000 is twice as fast, not four times."""
    write(tmp_path, "label", [32, 16, 8, 2, 4])
    write(tmp_path, "own", [32, 8, 4, 2, 1])
    arms = read_arms(tmp_path)
    target = targets(arms)["label"]
    assert (target.distance, target.steps) == (4, pytest.approx(8**0.5 * 1000))  # halfway from 8 to 2, in logarithms
    mean, _ = reach(arms["own"], target)
    assert mean.ratio == pytest.approx(2**0.5)
    assert not conditions(arms, "own")[1].passed


def test_a_bound_below_what_is_asked_leaves_it_open(tmp_path):
    """There by the first point, as a baseline is, too: which of them was sooner is not known. One seed that is known to
    be late decides, whatever the bounds of the others; a bound above what is asked is enough."""

    def found(name, label, *seeds):
        for seed, last in enumerate(seeds):
            write(tmp_path / name, "own", [last] * 5, seed)
        write(tmp_path / name, "label", label)
        return conditions(read_arms(tmp_path / name), "own")

    bounds = found("bounds", [2] * 5, 1, 1)[:3]
    figures = "not known", "not known", "not known, not known"
    assert [(one.passed, one.figures) for one in bounds] == [*zip((True, None, None), figures, strict=True)]
    said = verdict(found("again", [2] * 5, 1))
    assert said.startswith("open; not known: ratio at least 2, ratio above 1 for each seed")
    soon = found("soon", [4, 1, 2, 2, 2], 1, 1)[1:3]  # at 2 between 500 and 1,000 steps
    assert [(one.passed, one.figures) for one in soon] == [(None, "≥ 1.41×"), (True, "≥ 1.41×, ≥ 1.41×")]
    assert [one.passed for one in found("late", [2] * 5, 1, 2.9)[:3]] == [True, None, False]
    assert [one.passed for one in found("sure", FLAT, 1, 1)[:3]] == [True] * 3


@pytest.mark.parametrize(("first", "own"), [(500, [1] * 5), (1000, [1] * 4), (2000, [1] * 3), (500, [3, 1, 1, 1, 1])])
def test_a_baseline_there_by_its_first_point_may_have_been_there_sooner(tmp_path, first, own):
    """Its steps are at most those; of the arm's first point, or of a point before it, nothing is known, either."""
    write(tmp_path, "label", [2] * 4, steps=STEPS[1:])
    write(tmp_path, "own", own, steps=STEPS[STEPS.index(first) :])
    found = conditions(read_arms(tmp_path), "own")[:3]
    assert [(one.passed, one.figures) for one in found] == [(passed, "not known") for passed in (True, None, None)]


def test_a_ratio_is_as_sure_as_the_seeds_it_is_over(tmp_path):
    """16,000/step is at 1 after 16,000 steps, at 4 after 4,000, of the seeds' 8,000, and at 6 after 2,667; the seed
    that ends there was there after 1,000."""
    write(tmp_path, "own", power_law(16_000, 1))
    for seed, distances in enumerate(([9, 8, 7, 5, 1], [9, 8, 7, 5, 4], [9, 6, 5, 5, 6])):
        write(tmp_path, "label", distances, seed)
    arms = read_arms(tmp_path)
    assert [ratio_of(one) for one in over_each(arms["own"], arms["label"])] == ["not reached", "2×", "0.375×"]


def test_to_seeds_that_were_there_by_their_first_point_no_ratio_is_known(tmp_path):
    write(tmp_path, "own", [1] * 5)
    for seed, flat in enumerate((2, 4)):
        write(tmp_path, "label", [flat] * 5, seed)
    arms = read_arms(tmp_path)
    assert [ratio_of(one) for one in over_each(arms["own"], arms["label"])] == ["not known"] * 2


def test_guidance_that_does_not_help_is_no_target(tmp_path):
    write(tmp_path, "label", FLAT, variants={"guided-1.5": {"held_out": {"fd": 2.1}}})
    assert [*targets(read_arms(tmp_path))] == ["label"]


def test_label_with_its_best_guidance_is_a_target(tmp_path):
    for seed, shift in enumerate((0, 0.2)):
        ways = {"guided-1.25": 1.8 + shift, "guided-1.5": 1.95, "sde-250": 1.0}
        scores = {way: {"held_out": {"fd": fd}} for way, fd in ways.items()}
        write(tmp_path, "label", FLAT, seed, variants=scores)
    found = targets(read_arms(tmp_path))
    assert [*found] == ["label", "label guided-1.25"]
    assert (found["label guided-1.25"].distance, found["label guided-1.25"].steps) == (pytest.approx(1.9), 8000)


def test_baselines_that_still_fall_have_not_flattened(tmp_path):
    write(tmp_path, "label", [9, 8, 7, 5, 4.01])
    write(tmp_path, "none", [9, 8, 7, 5, 3.99])
    write(tmp_path, "label-align", [9, 8, 7], steps=(500, 1000, 8000))
    arms = read_arms(tmp_path)
    assert [flattening(arms[name]).passed for name in ("label", "none", "label-align")] == [True, False, None]
    assert flattening(arms["none"]).figures == "FD falls by 20% from 4,000 to 8,000 steps"
    assert flattening(arms["label-align"]).figures == "not scored at 4,000 steps, half of its last"


def test_the_mean_of_the_seeds_counts_at_steps_that_all_have(tmp_path):
    """A point that one lacks is left out; a run that ends earlier does not count yet, and is said to be missing."""
    write(tmp_path, "none", [9, 7, 5], seed=0, steps=(500, 1000, 4000))
    write(tmp_path, "none", [11, 9, 8, 7], seed=1, steps=(500, 1000, 2000, 4000))
    write(tmp_path, "none", [100, 1], seed=3, steps=(500, 1000))
    unscored = json.loads(write(tmp_path / "x", "none", [9, 9, 9], seed=2, steps=(500, 1000, 4000)).read_text())
    unscored["curve"].insert(1, {"step": 700, "seconds": 14.0, "holdout_loss": 0.3})
    (tmp_path / "third.json").write_text(json.dumps(unscored))
    (arm,) = read_arms(tmp_path).values()
    assert arm.steps == [500, 1000, 4000]
    assert arm.final == 7
    assert arm.distances.tolist() == [[9, 11, 9], [7, 9, 9], [5, 7, 9]]
    assert [run["seed"] for run in arm.behind] == [3]
    assert missing({"none": arm})[0] == "none (0 of 3 seeds; another at 4,000, 4,000, 4,000, 1,000 steps)"


def test_an_arm_is_complete_with_all_seeds_at_the_last_step(tmp_path):
    for seed in (10, 2, 0):
        write(tmp_path, "label", FLAT, seed)
        write(tmp_path, "none", FLAT, seed)
    arms = read_arms(tmp_path)
    assert [*arms] == ["none", "label"]  # in the order of the experiment, which is not that of names
    assert [run["seed"] for run in arms["label"].runs] == [0, 2, 10]
    assert not any(line.startswith(("none", "label (")) for line in missing(arms))
    arms["label"].runs.pop()
    assert missing(arms)[0] == "label (2 of 3 seeds)"


def test_an_audit_that_one_seed_lacks_is_the_mean_of_the_others(tmp_path):
    write(tmp_path, "own", FLAT, 0, copies=audit(0.1, 0.2))
    write(tmp_path, "own", FLAT, 1)
    newer = {space: figures | {"threshold": 2.5} for space, figures in audit(0.3).items()}
    write(tmp_path, "own", FLAT, 2, copies=newer)  # a figure that older runs lack has no mean
    found = known.audits(read_arms(tmp_path)["own"])
    assert {space: figures["excess"] for space, figures in found.items()} == {
        "regnetx_002@64": pytest.approx(0.2),
        "latents": 0.2,
    }
    assert "threshold" not in known.audits(read_arms(tmp_path)["own"])["regnetx_002@64"]


def judge(folder, factors=(2.5, 3, 4), label=FLAT, copies=(0.002, -0.001), steps=STEPS, **changes):
    """Conditions and verdict on nearest-10, a seed for each factor of its speed, beside a flat label."""
    for seed in range(3):
        write(folder, "label", label, seed, steps=STEPS[: len(label)])
    for seed, factor in enumerate(factors):
        write(folder, "nearest-10", faster(factor, steps), seed, steps, copies=audit(*copies), **changes)
    found = conditions(read_arms(folder), "nearest-10")
    *passed, seeds = [one.passed for one in found]
    assert seeds is (True if len(factors) == 3 else None)
    return passed, verdict(found)


def test_the_claim_holds_when_all_its_conditions_are_met(tmp_path):
    assert judge(tmp_path) == ([True] * 5, "holds")


@pytest.mark.parametrize(
    ("changes", "passed", "said"),
    [
        ({"factors": (0.9, 0.95, 0.95)}, [False, False, False, True, True], "fails, FD does not come down to label's"),
        ({"factors": (1.99,) * 3}, [True, False, True, True, True], "does not hold, not met: ratio at least 2"),
        ({"factors": (2.01,) * 3}, [True] * 5, "holds"),
        (
            {"factors": (9, 9, 0.99)},
            [True, True, False, True, True],
            "does not hold, not met: ratio above 1 for each seed",
        ),
        (  # longer than label, whose distance one seed has after 8,081 steps
            {"factors": (9, 9, 0.99), "steps": (500, 16_000)},
            [True, True, False, True, True],
            "does not hold, not met: ratio above 1 for each seed",
        ),
        (
            {"training": 1.9},  # label's is 1.5
            [True, True, True, False, True],
            "does not hold, not met: same order by FD to training images",
        ),
        (
            {"copies": (0.002, 0.0101)},
            [True, True, True, True, False],
            "does not hold, not met: excess of near copies below 1%",
        ),
        ({"copies": ()}, [True, True, True, True, None], "open; not known: excess of near copies below 1%"),
        (  # it may yet come down to label's
            {"factors": (1.5,) * 3, "steps": STEPS[:4]},
            [None, None, None, None, True],
            "open; not known: passes label, ratio at least 2, ratio above 1 for each seed, same order by FD to "
            "training images",
        ),
        (  # one seed may yet come down
            {"factors": (3, 1.5, 3), "steps": STEPS[:4]},
            [True, True, None, None, True],
            "open; not known: ratio above 1 for each seed, same order by FD to training images",
        ),
        (  # it has come down already, while the order waits
            {"factors": (3,) * 3, "steps": STEPS[:4]},
            [True, True, True, None, True],
            "open; not known: same order by FD to training images",
        ),
        (  # and too late
            {"factors": (1.5,) * 3, "steps": (500, 6000)},
            [True, False, True, None, True],
            "does not hold, not met: ratio at least 2; not known: same order by FD to training images",
        ),
        (
            {"label": FLAT[:4]},  # whose last distance is not known
            [None, None, None, None, True],
            "open; not known: passes label, ratio at least 2, ratio above 1 for each seed, same order by FD to "
            "training images",
        ),
    ],
)
def test_the_claim_names_what_is_not_met(tmp_path, changes, passed, said):
    assert judge(tmp_path, **changes) == (passed, said)


def test_too_few_seeds_decide_nothing_for_good(tmp_path):
    """Three of label and of the arm; a failure so far is said to be one."""
    assert judge(tmp_path / "two", (2.5, 3))[1] == "open; not known: all seeds"
    assert judge(tmp_path / "one", (0.9,))[1] == (
        "open, so far it fails, FD does not come down to label's; not known: all seeds"
    )
    judge(tmp_path / "three")
    write(tmp_path / "three", "nearest-1", faster(3), copies=audit(0.002))
    arms = read_arms(tmp_path / "three")
    assert conditions(arms, "nearest-1")[-1].figures == "label 3, nearest-1 1"
    assert verdict(conditions(arms, "nearest-1")) == "open; not known: all seeds"
    arms["nearest-1"].runs *= 3
    assert verdict(conditions(arms, "nearest-1")) == "holds"
    arms["label"].runs.pop()
    assert verdict(conditions(arms, "nearest-1")) == "open; not known: all seeds"


def test_the_order_is_that_of_all_primary_arms(tmp_path):
    """Two others that swap count, and are named; an arm that is neither primary nor judged does not."""
    judge(tmp_path)
    write(tmp_path, "own", [1.9] * 5, training=1.45)
    write(tmp_path, "none", [3] * 5)
    write(tmp_path, "random", [4] * 5, training=0.1)
    arms = read_arms(tmp_path)
    assert conditions(arms, "nearest-10")[3].figures == "the same for 4 arms"
    write(tmp_path, "nearest-10-align", [1.8] * 5, training=1.46)
    order = conditions(read_arms(tmp_path), "nearest-10")[3]
    assert (order.passed, order.figures) == (False, "nearest-10-align and own swap")
    assert "random" in conditions(arms, "random")[3].figures


def test_an_arm_without_distances_to_training_images_has_no_place_in_their_order(tmp_path):
    judge(tmp_path)
    run = json.loads(write(tmp_path, "own", [1.9] * 5).read_text())
    for point in run["curve"]:
        del point["training"]
    next(tmp_path.glob("own*")).write_text(json.dumps(run))
    order = conditions(read_arms(tmp_path), "nearest-10")[3]
    assert (order.passed, order.figures) == (True, "the same for 2 arms")


def test_without_a_baseline_nothing_is_known(tmp_path):
    write(tmp_path, "own", FLAT, copies=audit(0.002))
    assert [one.passed for one in conditions(read_arms(tmp_path), "own")] == [None] * 4 + [True, None]


def test_where_runs_come_from_is_said_in_words():
    """First and last day, and each device and version once, whatever the order; of other samples only if asked."""
    late = made_on("2026-11-30T01:00:00+00:00")
    assert known.made([{}, late]) == "2026-11-30, NVIDIA H200, torch 2.11.0"
    runs = [late, made_on("2026-11-23") | {"variants": {"guided-1.5": made_on("2026-12-01", "CPU x86_64", "2.14.1")}}]
    runs += [made_on("2026-11-25T23:59:59+00:00")]
    assert known.made(runs) == "2026-11-23 to 2026-11-30, NVIDIA H200, torch 2.11.0"
    everything = "2026-11-23 to 2026-12-01, CPU x86_64 and NVIDIA H200, torch 2.11.0 and 2.14.1"
    assert known.made(runs, ways=True) == everything
    assert known.made([{"made": {"date": "2026-11-23"}}, {"variants": {"sde-250": {}}}], ways=True) == "2026-11-23"
    assert known.made([{}]) == known.made([]) == ""


def controls(floor, snippets):
    return {
        "random training images": {"num_images": 10, "held_out": {"fd": floor}, "training": {"fd": 9}},
        "held-out images": {"num_images": 10, "training": {"fd": 0.0}},
        "nearest training images of the snippets (own)": {"num_images": 10, "held_out": {"fd": snippets}},
    }


def test_the_checks_before_any_result_is_believed(tmp_path):
    losses = {"own": 0.1, "random": 0.15, "nearest-10": 0.2, "none": 0.3, "label": 0.2, "class-mean": 0.2}
    for name, loss in losses.items():
        write(tmp_path, name, [16, 8, 4, 3, 2.9] if name == "class-mean" else FLAT, loss=loss)
    arms = read_arms(tmp_path)
    assert [one.passed for one in sanity(arms, controls(1.9, 3))] == [True] * 6
    assert sanity(arms, {})[2].passed is None
    assert sanity(arms, controls(1.9, 1.8))[2].figures == (
        "1.9; the next, nearest training images of the snippets (own), 1.8"
    )
    assert [sanity(arms, controls(floor, snippets))[2].passed for floor, snippets in ((2.1, 3), (1.9, 1.8))] == [
        False,
        False,
    ]
    for deviation, snippets, passed in ((0.03, 1.82, True), (0.03, 1.81, False)):  # 0.03·2√2 = 0.085 below 1.9
        rows = controls(1.9, snippets)
        rows["random training images"]["deviation"] = {"held_out": {"fd": deviation}}
        assert sanity(arms, rows)[2].passed is passed
        assert sanity(arms, rows)[2].figures.startswith("1.9 ± 0.03; the next, nearest training images")
    rows = controls(2.01, 3)  # samples may not lie below at all
    rows["random training images"]["deviation"] = {"held_out": {"fd": 1.0}}
    assert sanity(arms, rows)[2].passed is False
    for changed, value, failing in (("own", 0.16, 0), ("own", 0.21, 3), ("none", 0.19, 3)):
        other = tmp_path / f"{changed}-{value}"
        for name, loss in (losses | {changed: value}).items():
            write(other, name, FLAT, loss=loss)
        assert sanity(read_arms(other), controls(1.9, 3))[failing].passed is False
    write(tmp_path / "apart", "label", FLAT)
    write(tmp_path / "apart", "class-mean", [16, 8, 4, 3.2, 3.1])
    found = sanity(read_arms(tmp_path / "apart"), {})
    assert [one.passed for one in found] == [None, False, None, None, True, True]
    assert found[1].figures == "class-mean 3.1, label 2 at 8,000 steps"
    assert found[0].figures == "takes own, random at one step"


def test_arms_are_compared_at_one_step_and_one_speed(tmp_path):
    write(tmp_path, "label", FLAT, images_per_second=1000.0, variants={"guided-2": {"held_out": {"fd": 1}}})
    write(tmp_path, "own", FLAT[:4], steps=STEPS[:4], images_per_second=2000.0)
    write(tmp_path, "label-align", FLAT, images_per_second=500.0)
    arms = read_arms(tmp_path)
    assert common_step(arms.values()) == 4000
    cut = arms["label"].until(4000)
    assert (cut.steps, cut.final) == ([*STEPS[:4]], FLAT[3])
    assert [*targets({"label": cut})] == ["label"]  # guidance was tried at the last step
    assert [*targets(arms)] == ["label", "label-align", "label guided-2"]
    assert rates(arms) == {False: 2000.0, True: 500.0}
    assert arms["label"].seconds(2000.0).tolist() == [step * 256 / 2000 for step in STEPS]


def test_some_data_sets_are_whole_after_fewer_steps(tmp_path):
    """Four thousand steps answer every condition on fashion, but not on glyphs."""
    for name, passed in (("fashion", True), ("glyphs", None)):
        for arm, curve in (("label", FLAT[:4]), ("own", [16, 8, 2, 1])):
            write(tmp_path / name, arm, curve, steps=STEPS[:4], dataset=name)
        arms = read_arms(tmp_path / name)
        assert [one.passed for one in conditions(arms, "own")[:4]] == [passed] * 4
        assert ("own (1 of 3 seeds)" in missing(arms)) == bool(passed)
    assert "own (0 of 3 seeds; another at 4,000 steps)" in missing(arms)


def test_all_but_rate_scale_and_bank_is_the_same_in_every_arm(tmp_path):
    write(tmp_path, "none", FLAT, settings=SETTINGS | {"network": ["qk_norm=true"], "batch_size": 9})
    write(tmp_path, "label", FLAT, settings=SETTINGS | {"network": ["qk_norm=true"], "lr": 1, "scale": None})
    write(tmp_path, "own", FLAT, settings=SETTINGS | {"network": ["qk_norm=true"], "k": 7})
    write(tmp_path, "random", FLAT)
    found = sanity(read_arms(tmp_path), {})[4]
    assert not found.passed
    assert found.figures == "none has batch_size: 9 and None; random has network: None and ['qk_norm=true']"


def test_a_curve_that_jumps_up_is_no_result(tmp_path):
    """By less than a fifth is noise; and a baseline that rises by more has not flattened."""
    write(tmp_path, "own", [16, 8, 9.5, 4, 4.7])
    assert sanity(read_arms(tmp_path), {})[5].passed
    write(tmp_path, "none", [16, 8, 4, 2, 2], seed=0)
    write(tmp_path, "none", [16, 8, 10, 2, 131], seed=1)
    arms = read_arms(tmp_path)
    found = sanity(arms, {})[5]
    assert not found.passed
    assert found.figures == "none, seed 1, from 8 to 10 at 2,000 steps; none, seed 1, from 2 to 131 at 8,000 steps"
    assert not flattening(arms["none"]).passed
    assert flattening(arms["none"]).figures == "FD rises by 3225% from 4,000 to 8,000 steps"


def test_checks_compare_at_the_last_step_in_common(tmp_path):
    write(tmp_path, "own", [9, 9], loss=0.4, steps=(500, 1000))
    path = write(tmp_path, "random", [9, 9, 9], loss=0.5, steps=(500, 1000, 2000))
    run = json.loads(path.read_text())
    run["curve"][-1]["holdout_loss"] = 0.1
    path.write_text(json.dumps(run))
    first = sanity(read_arms(tmp_path), {})[0]
    assert (first.passed, first.figures) == (True, "own 0.4, random 0.5 at 1,000 steps")


def test_arms_and_data_sets_are_those_of_the_experiment():
    from scripts.miniature import ARMS, DATA

    assert {*known.PRIMARY, *known.OTHERS} == {*ARMS}
    assert {name: ARMS[name].share for name in known.SHARES} == known.SHARES
    glyphs = {name: data.characters for name, data in DATA.items() if data.characters and data.holdout == 0.1}
    assert glyphs == known.CHARACTERS


def test_folders_that_do_not_hold_arms_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no runs in it"):
        read_arms(tmp_path)
    first = write(tmp_path, "own", [5] * 5)
    again = write(tmp_path, "own", [5] * 5)
    with pytest.raises(ValueError, match="two runs of arm 'own' have one seed"):
        read_arms(tmp_path)
    again.unlink()
    other = write(tmp_path, "own", [5] * 5, seed=1, settings=SETTINGS | {"k": 7})
    with pytest.raises(ValueError, match="other settings, k: 7 and 100; move one away"):
        read_arms(tmp_path)
    other.unlink()
    unscored = json.loads(first.read_text()) | {"curve": [{"step": 1, "holdout_loss": 0.1}]}
    first.write_text(json.dumps(unscored))
    with pytest.raises(ValueError, match="no point of its curve was scored"):
        read_arms(tmp_path)
    (tmp_path / "other.json").write_text('{"metrics": {}}')
    with pytest.raises(ValueError, match=r"no run of scripts\.miniature: it has no arm, seed, dataset"):
        read_run(tmp_path / "other.json")


def test_arm_reads_what_is_not_given_as_nan():
    point = {"step": 1, "held_out": {"fd": 3.0}}
    arm = Arm("own", [{"curve": [point]}])
    assert arm.final == 3
    assert np.isnan(arm.values("held_out", "precision")).all()
    assert np.isnan(arm.values("seconds")).all()
