"""The experiment end to end at toy size: what it writes, what it skips, and the settings it picks."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from dataset import LatentDataset, read_meta
from evaluations import evaluator
from memory.bank import MemoryBank
from models.encoder import load_encoder
from scripts import compare, encode_dataset, make_assets, miniature, miniature_data, miniature_run
from scripts.arms import DIVERSE, LEAST, PRIMARY, SEEDS, whole_steps
from scripts.miniature_data import ARMS, BESIDE, DATA, DRAWS, ENCODER, METRIC, SAMPLERS

HEUN = {"heun-50": (*BESIDE["heun-50"], "--seed", "77")}  # after two steps of training, both methods sample the same
WAYS = {"euler-50": SAMPLERS["euler-50"], "snippets-held-out": DRAWS["snippets-held-out"]} | HEUN
TOY = ["--model", "SiT-S/8", "--batch-size", "8", "--steps", "2", "--num-images", "16"]


@pytest.fixture(scope="module")
def places(root, tmp_path_factory):
    """ROOT with 160 images of clothes, and LOGS with a metric encoder of random weights."""
    base = tmp_path_factory.mktemp("miniature")
    words = ["--source", str(root / "assets" / "fashion-mnist"), "--train", "160", "--test", "1"]
    make_assets.main(["images", *words, "--out", str(base / "root" / "sources" / "fashion-mnist")])
    (base / "logs" / "fashion").mkdir(parents=True)
    torch.manual_seed(0)
    weights = timm.create_model(METRIC.partition("@")[0]).state_dict()
    save_file(weights, base / "logs" / "fashion" / "metric.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature_run, "SAMPLER", ("--sampler", "euler", "--steps", "2"))
        patch.setitem(DATA, "fashion", replace(DATA["fashion"], beside_from=2))
        patch.setattr(miniature_data, "BESIDE", HEUN)
        yield base


def run(places, *words, more=()):
    miniature.main(["fashion", *words, *TOY, *more, "--root", str(places / "root"), "--logs", str(places / "logs")])


def prepared(places, *words):
    words = ["fashion", *words, *TOY, "--root", str(places / "root"), "--logs", str(places / "logs")]
    return miniature.Miniature(miniature.parse(words))


def points(patch, steps):
    """Score runs of the data set after these steps, besides the last."""
    patch.setitem(DATA, "fashion", replace(DATA["fashion"], points=steps))


def log(places, name):
    return json.loads((places / "logs" / "fashion" / f"{name}.json").read_text())


def test_search_then_runs(places, monkeypatch, capsys):
    monkeypatch.setitem(DATA, "fashion", replace(DATA["fashion"], scales=(1, 6)))
    run(places, "nearest-10", "--search")
    searched = sorted((places / "logs" / "fashion" / "search").glob("*.json"))
    logs = [json.loads(path.read_text()) for path in searched]
    tried = [(found["settings"]["lr"], found["settings"]["scale"]) for found in logs]
    scores = {setting: found["curve"][-1]["held_out"]["fd"] for setting, found in zip(tried, logs, strict=True)}
    assert len(tried) == 3  # both scales at the middle rate, then the other rate at the better scale
    kept = (places / "root" / "runs" / "fashion" / "search").glob("*/checkpoints/*")
    assert [path.name for path in kept] == ["0000002-ema.pt"] * 3

    capsys.readouterr()
    run(places, "nearest-10", "--search")
    run(places, "nearest-10", "--seeds", "0")
    assert "$" not in capsys.readouterr().out  # the best run of the search is the one of seed 0
    assert log(places, "nearest-10-0") == min(logs, key=lambda found: found["curve"][-1]["held_out"]["fd"])
    assert (places / "root" / "runs" / "fashion" / "nearest-10-0" / "checkpoints" / "0000002-ema.pt").is_file()
    half = {key: value for key, value in logs[0].items() if key != "copies"}
    searched[0].write_text(json.dumps(half))
    with pytest.raises(ValueError, match=rf"nothing in .*{re.escape(searched[0].name)}, or half a run: run --search"):
        run(places, "nearest-10", "--seeds", "3")
    searched[0].write_text(json.dumps(logs[0]))

    points(monkeypatch, (1,))
    monkeypatch.setitem(ARMS, "nearest-10", replace(ARMS["nearest-10"], variants=WAYS))
    capsys.readouterr()
    run(places, "nearest-10", "--seeds", "3", "--variants")
    printed = capsys.readouterr().out
    found = log(places, "nearest-10-3")
    assert [line for line in printed.splitlines() if "train.py" in line] == [f"$ {found['commands']['train']}"]
    assert (found["settings"]["lr"], found["settings"]["scale"]) == min(scores, key=scores.get)
    assert [point["step"] for point in found["curve"]] == [1, 2]
    for point in found["curve"]:
        assert point["images"] == 8 * point["step"]
        assert point.keys() >= {"seconds", "train_loss", "holdout_loss"}
        for figures in (point, *([point["heun-50"]] if point["step"] == 2 else [])):
            for reference in ("held_out", "training"):
                assert figures[reference].keys() == {"fd", "precision", "recall", "kd"}
    assert "heun-50" not in found["curve"][0]
    assert found["curve"][1]["heun-50"]["held_out"] != found["curve"][1]["held_out"]
    assert found["variants"].keys() == WAYS.keys()
    by_heun = found["variants"]["heun-50"]
    assert {key: by_heun[key] for key in ("held_out", "training")} == found["curve"][1]["heun-50"]
    assert by_heun["command"] == found["commands"]["sample-heun-50"]
    usual = found["commands"]["sample"].replace("/nearest-10-3/2 ", "/nearest-10-3/2-heun-50 ")
    assert found["commands"]["sample-heun-50"] == f"{usual} --sampler heun --seed 77"
    assert printed.count("$ python sample_ddp.py") == 5  # steps 1, 2 and 2 by Heun, which is not made twice; two ways
    usual = found["commands"]["sample"].replace("/nearest-10-3/2 ", "/nearest-10-3/euler-50 ")
    assert found["variants"]["euler-50"]["command"] == usual
    assert found["copies"].keys() == found["copies_by"]["heun-50"].keys() == {"latent", METRIC}
    assert found["copies_by"]["heun-50"] != found["copies"]
    assert "--snippet-from nearest" in found["commands"]["train"]
    assert re.search(
        r"evaluations.evaluator \S*fashion-holdout \S*/nearest-10-3/2/samples.npz", found["commands"]["evaluate"]
    )
    assert "/nearest-10-3/2-heun-50/samples.npz" in found["commands"]["evaluate-heun-50"]
    assert not (places / "root" / "samples" / "fashion" / "nearest-10-3").exists()
    assert found["settings"]["k"] == 15  # 10% of 154 images
    rows = log(places, "controls")["rows"]
    assert "held_out" not in rows["held-out images"]
    assert rows["random training images"]["held_out"]["fd"] > 0
    assert rows["random training images"]["deviation"]["held_out"].keys() == {"fd", "precision", "recall", "kd"}

    capsys.readouterr()
    run(places, "nearest-10", "--seeds", "3", "--variants")
    assert "$" not in capsys.readouterr().out  # nothing is left to do
    earlier = found | {"variants": {}, "made": {"date": "earlier"}}
    (places / "logs" / "fashion" / "nearest-10-3.json").write_text(json.dumps(earlier))
    shutil.rmtree(places / "root" / "runs" / "fashion" / "nearest-10-3")
    run(places, "nearest-10", "--seeds", "3", "--variants")  # its weights are made again, its curve is not
    again = log(places, "nearest-10-3")
    assert (again["made"], again["curve"]) == ({"date": "earlier"}, found["curve"])
    assert all(way["made"]["versions"] == found["made"]["versions"] for way in again["variants"].values())
    by_heun = again["variants"]["heun-50"]  # of these weights, which on a CPU are the same again
    assert "/nearest-10-3/heun-50 " in by_heun["command"]
    assert {key: by_heun[key] for key in ("held_out", "training")} == found["curve"][1]["heun-50"]
    cut_off = found | {"steps": 1, "curve": [found["curve"][0] | {"seconds": -1}]}
    del cut_off["copies"]  # which end a run
    (places / "logs" / "fashion" / "nearest-10-3.json").write_text(json.dumps(cut_off))
    shutil.rmtree(places / "root" / "runs" / "fashion" / "nearest-10-3")
    run(places, "nearest-10", "--seeds", "3")
    again = log(places, "nearest-10-3")
    assert again["curve"][0]["seconds"] > 0  # with its weights lost, the whole run is made again
    assert [point["held_out"] for point in again["curve"]] == [point["held_out"] for point in found["curve"]]
    assert again["variants"] == {}  # not asked for this time
    run(places, "nearest-10", "--seeds", "4", "--seconds", "0")
    assert "nearest-10-4: not begun" in capsys.readouterr().out


def without_heun(places, name):
    """Make a log what it was before points were sampled by Heun's method too; returns it."""
    found = log(places, name)
    found["curve"] = [{key: value for key, value in point.items() if key not in BESIDE} for point in found["curve"]]
    (places / "logs" / "fashion" / f"{name}.json").write_text(json.dumps(found))
    return found


def test_a_run_without_heuns_figures_is_repeated_only_when_asked(places, monkeypatch, capsys):
    def cut(words):
        (runs / "none-9").mkdir()
        raise KeyboardInterrupt

    given, train = ("none", "--lr", "1e-3", "--seeds", "9"), miniature_run.train.main
    logs, runs = places / "logs" / "fashion", places / "root" / "runs" / "fashion"
    run(places, *given)
    old = without_heun(places, "none-9")
    capsys.readouterr()
    run(places, *given)
    assert "$" not in capsys.readouterr().out
    run(places, *given, "--again", "--seconds", "0")
    assert "none-9: not begun" in capsys.readouterr().out
    assert log(places, "none-9") == old

    monkeypatch.setattr(miniature_run.train, "main", cut)
    with pytest.raises(KeyboardInterrupt):
        run(places, *given, "--again")
    aside = f"other/{old['made']['date'][:10]}/none-9"
    assert (log(places, aside), (logs / "none-9.json").exists()) == (old, False)
    assert (logs / f"{aside}.png").is_file()
    assert (runs / aside / "checkpoints" / "0000002-ema.pt").is_file()
    monkeypatch.setattr(miniature_run.train, "main", train)
    run(places, *given, "--again")  # goes on
    new = log(places, "none-9")
    assert new["curve"][0]["heun-50"]["held_out"]["fd"] > 0
    assert new["made"] != old["made"]
    assert log(places, aside) == old
    capsys.readouterr()
    run(places, *given, "--again")
    assert "$" not in capsys.readouterr().out

    again = without_heun(places, "none-9")
    with pytest.raises(ValueError, match=rf"--again: an earlier none-9 is in \S*{aside} already; move that away"):
        run(places, *given, "--again")
    assert log(places, "none-9") == again
    assert (runs / "none-9" / "checkpoints" / "0000002-ema.pt").is_file()


def test_a_run_with_other_settings_is_not_overwritten(places):
    run(places, "none", "--lr", "1e-3", "--seeds", "11")
    old = log(places, "none-11")
    with pytest.raises(ValueError, match=r"none-11\.json has other settings, lr: 0\.001 and 0\.002; --again moves it"):
        run(places, "none", "--lr", "2e-3", "--seeds", "11")
    assert log(places, "none-11") == old
    run(places, "none", "--lr", "2e-3", "--seeds", "11", "--again")
    assert log(places, "none-11")["settings"]["lr"] == 2e-3
    assert log(places, f"other/{old['made']['date'][:10]}/none-11") == old


def test_what_is_repeated_comes_from_the_search_if_that_was_repeated(places, capsys):
    given = ("none", "--lr", "3e-3")
    searched, trained = "search/none-lr0.003-scale0", lambda: capsys.readouterr().out.count("$ python train.py")
    run(places, *given, "--search")
    whole, old = log(places, searched), without_heun(places, searched)
    capsys.readouterr()
    run(places, *given)
    assert (trained(), log(places, "none-0")) == (0, old)
    (places / "logs" / "fashion" / f"{searched}.json").write_text(json.dumps(whole))
    run(places, *given, "--again")
    assert (trained(), log(places, "none-0")) == (0, whole)
    aside = f"other/{old['made']['date'][:10]}"
    assert log(places, f"{aside}/none-0") == old

    for part in ("logs", "root/runs"):
        shutil.rmtree(places / part / "fashion" / "other")
    assert [without_heun(places, name) for name in (searched, "none-0")] == [old, old]
    run(places, *given, "--again")
    assert trained() == 1  # for the search lacks them, too
    assert "heun-50" in log(places, "none-0")["curve"][0]
    run(places, *given, "--search", "--again")
    assert trained() == 1
    assert "heun-50" in log(places, searched)["curve"][0]
    assert log(places, f"{aside}/{searched}") == old


def test_what_another_process_is_at_is_left_to_it(places, capsys):
    other = prepared(places, "none").data
    with other.claimed("none-6", wait=False) as mine:
        assert mine
        run(places, "none", "--lr", "1e-3", "--seeds", "6")
        assert "none-6: another process is at it" in capsys.readouterr().out
    with other.claimed("none-6", wait=False) as mine:
        assert mine
    assert not (places / "logs" / "fashion" / "none-6.json").exists()


def test_on_a_gpu_one_process_trains_at_a_time(places, monkeypatch):
    """On whatever data set: the claim is the GPU's, also of a part of one, whose name has slashes."""
    free = {}

    def diverge(words):
        for gpu in ("0", "MIG-GPU-5/1/0"):
            with miniature_data.claimed(places / "root", f"training-on-{gpu}", wait=False) as free[gpu]:
                pass
        raise FloatingPointError

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-5/1/0")
    monkeypatch.setattr(miniature_run.train, "main", diverge)
    with pytest.raises(FloatingPointError):
        run(places, "none", "--lr", "1e-3", "--seeds", "7")
    assert free == {"0": True, "MIG-GPU-5/1/0": False}


def test_a_setting_that_diverges_loses(places, monkeypatch):
    def diverge(words):
        raise FloatingPointError("the loss of step 57 is not finite")

    given = ("class-mean", "--lr", "1e-3", "--scale", "6")
    monkeypatch.setattr(miniature_run.train, "main", diverge)
    with pytest.raises(FloatingPointError):
        run(places, *given, "--seeds", "5")
    run(places, "none", "--lr", "1e9", "--search")
    found = log(places, "search/none-lr1e+09-scale0")
    assert (found["diverged"], found["curve"]) == ("the loss of step 57 is not finite", [])
    monkeypatch.setattr(miniature_run.train, "main", None)
    run(places, "none", "--lr", "1e9", "--search")  # is not tried again
    with pytest.raises(ValueError, match=r"nothing in .*none-lr0\.001-scale0\.json, or half a run"):
        run(places, "none")


@pytest.mark.parametrize("arm", ["label+nearest-10", "class-mean"])
def test_arms_of_every_kind(places, arm):
    run(places, arm, "--lr", "1e-3", "--scale", "6")
    found = log(places, f"{arm}-0")
    assert found["curve"][-1]["training"]["fd"] > 0
    assert found["settings"]["k"] == {"label+nearest-10": 15, "class-mean": 154}[arm]
    assert ("label_scale=6" in found["commands"]["train"]) == (arm == "label+nearest-10")


def test_alignment_trains_on_stored_patch_tokens(places, monkeypatch, capsys):
    """Added once, by one process, also after it was cut off, to a store whose other runs stay valid."""
    other, called = prepared(places).data, []
    before = read_meta(other.store)

    def watched(command, words):
        with other.claimed("data", wait=False) as free:
            called.append((command.__name__.rpartition(".")[2], "--patches" in words, free))
        return call(command, words)

    def cut(*arguments):
        raise KeyboardInterrupt

    call, finish = miniature_data.call, encode_dataset.finish
    given = ("--lr", "1e-3", "--scale", "6")
    run(places, "label", *given)
    align = f"{ENCODER}@128"  # 4 × 4 patches, as many as SiT-S/8 has tokens
    for module in (miniature_data, miniature_run):
        monkeypatch.setattr(module, "ALIGN", align)
        monkeypatch.setattr(module, "call", watched)
    monkeypatch.setattr(encode_dataset, "finish", cut)
    with pytest.raises(KeyboardInterrupt):
        run(places, "label-align", *given)
    monkeypatch.setattr(encode_dataset, "finish", finish)
    capsys.readouterr()
    run(places, "random", "label-align", "label", *given)
    assert "continuing" in capsys.readouterr().out
    writing = [("encode_dataset", True, False)] * 2  # cut off, then ended before the features of `random` are added
    writing += [("derive_features", False, False), ("build_bank", False, False)]
    assert [what for what in called if what[0] in ("encode_dataset", "derive_features", "build_bank")] == writing
    assert all(free for name, _, free in called if name in ("train", "sample_ddp", "copies"))
    assert sum(name == "train" for name, *_ in called) == 2  # `label` was there

    train_line = log(places, "label-align-0")["commands"]["train"]
    assert f"--resident --align-coeff 0.5 --align-encoder {align} " in train_line
    after = read_meta(other.store)
    assert after["patches"] == {align: [16, 1280]}
    assert after["encoders"].keys() == before["encoders"].keys() | {align, "random"}
    assert after["fingerprint"] == before["fingerprint"]
    store = LatentDataset(other.store, patches=align, images=True)
    rows = np.arange(0, len(store), 50)
    batch = store.fetch(rows, np.zeros_like(rows))
    tokens = load_encoder(align)(batch["image"], return_patches=True)[1]
    torch.testing.assert_close(batch["patches"].float(), tokens, rtol=1e-3, atol=1e-3)


def test_the_alignment_has_as_many_patches_as_the_network_tokens():
    size, patch = 32, 4  # of the stores, and of the network
    assert miniature.parse(["glyphs"]).model == f"SiT-S/{patch}"
    assert load_encoder(miniature_data.ALIGN).num_patches == (size // patch) ** 2


def test_scores_are_the_evaluators(places, monkeypatch, tmp_path):
    """Bit for bit, of one set of samples after another, though the network and the references are read only once."""
    made, loaded = prepared(places), []
    load = evaluator.load_network
    monkeypatch.setattr(evaluator, "load_network", lambda *given: loaded.append(given) or load(*given))
    references = {"held_out": made.data.holdout, "training": made.data.store}
    for seed in (0, 1):
        images, folder = np.random.default_rng(seed).integers(0, 256, (16, 32, 32, 3), np.uint8), tmp_path / str(seed)
        folder.mkdir()
        np.savez(folder / "samples.npz", arr_0=images)
        torch.backends.cudnn.allow_tf32 = False  # as encoding leaves it
        torch.backends.cuda.matmul.allow_tf32 = True  # as training does
        scores = made.scores(folder)
        assert torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert len(loaded) == 1 + 2 * seed
        words = made.scores.words(folder)
        for name, path in references.items():
            evaluator.main([str(path), *words[1:], "--no-cache", "--out", str(folder / "result.json")])
            metrics = json.loads((folder / "result.json").read_text())["metrics"]
            assert scores[name] == {
                kind.lower(): metrics[f"{kind}-{METRIC}"] for kind in ("FD", "Precision", "Recall", "KD")
            }
        assert words[0] == str(references["held_out"])


def test_the_audit_keeps_what_tells_whether_its_threshold_means_anything(places, monkeypatch, tmp_path):
    kept_as_they_are = miniature_run.AUDITED
    assert {"threshold", "excess", "authenticity", "wide_threshold", "wide_excess"} < set(kept_as_they_are)
    figures = {name: place for place, name in enumerate(kept_as_they_are)}
    quantiles = {f"quantiles{of}": {"0.25": 0, "0.5": median} for of, median in (("", 101), ("_held_out", 201))}
    (tmp_path / "copies.json").write_text(json.dumps({"spaces": {"latent": figures | quantiles | {"exact": -1}}}))
    monkeypatch.setattr(miniature_run, "call", lambda command, words: None)
    made = prepared(places)
    kept = miniature_run.Run(made.args, made.scores, "none", 10, 1e-3, None).audit(tmp_path)
    assert kept == {"latent": figures | {"median": 101, "median_held_out": 201}}


def test_pairs_of_label_and_snippet_come_from_one_image(places):
    made = prepared(places)
    one = miniature_run.Run(made.args, made.scores, "label+nearest-10", 8, 1e-3, 6)
    _, labels, _, rows = one.draw()
    rows_of = MemoryBank.load(one.bank).assignment[:, 0].tolist()
    known = set(zip(LatentDataset(made.data.store).labels, rows_of, strict=True))
    assert known >= set(zip(np.load(labels), np.load(rows), strict=True))


def test_data_sets_of_the_same_images_share_store_and_metric_but_no_run(places, monkeypatch, capsys):
    name = next(name for name, kind in DATA.items() if kind.images)
    run(places, "nearest-10", "--lr", "1e-3", "--scale", "6", "--seeds", "40")
    capsys.readouterr()
    words = [*TOY, "--root", str(places / "root"), "--logs", str(places / "logs"), "--lr", "1e-3"]
    miniature.main([name, "nearest-10", *words, "--scale", "6", "--seeds", "40"])
    assert re.findall(r"^\$ python (?:-m )?(\S+)", capsys.readouterr().out, re.M)[:2] == ["train.py", "sample_ddp.py"]
    ours, theirs = (json.loads((places / "logs" / of / "nearest-10-40.json").read_text()) for of in (name, "fashion"))
    assert ours["curve"][-1]["train_loss"] == theirs["curve"][-1]["train_loss"]
    assert not (places / "root" / "data" / name).exists()
    assert not (places / "root" / "banks" / name).exists()
    assert not (places / "root" / "claims" / f"{name}-data").exists()  # a writer holds that of the images
    assert (places / "root" / "runs" / name / "nearest-10-40").is_dir()


def test_every_arm_has_settings():
    assert all(arm.like is None or ARMS[arm.like].like is None for arm in ARMS.values())
    assert all(DATA[data.like].like == data.like for data in DATA.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nearest-11"], "arms nearest-11"), (["rows-10", "--search"], "rows-10 share another arm's settings")],
)
def test_bad_arms_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        miniature.main(["fashion", *words])
    assert message in capsys.readouterr().err


def test_the_script_of_the_whole_protocol_has_every_arm(root, tmp_path):
    """miniature.sh, whose `python` only notes its words: searches first, then each arm once, its seeds, its steps."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >>"$WORDS"\n')
    (tmp_path / "python").chmod(0o755)
    logs, path = tmp_path / "logs", f"{tmp_path}:{os.environ['PATH']}"
    shell = os.environ | {"PATH": path, "VIRTUAL_ENV": "x", "WORDS": str(tmp_path / "words"), "LOGS": str(logs)}
    subprocess.run(["bash", root / "scripts" / "miniature.sh", "--seconds", "60"], env=shell, check=True)
    lines = [line.split() for line in (tmp_path / "words").read_text().splitlines()]
    asked = [miniature.parse(words[2:]) for words in lines if words[1] == "scripts.miniature"]
    assert {(args.logs, args.seconds) for args in asked} == {(logs, 60)}

    searches = {args.dataset: args.arms for args in asked if args.search}
    assert all(args.search for args in asked[: len(searches)])
    searched = [arm for arm in ARMS if ARMS[arm].like is None]
    assert searches == {kind.like: searched for kind in DATA.values()}
    varied = [arm for arm in ARMS if ARMS[arm].variants]
    assert {args.dataset: args.arms for args in asked if args.variants} == {name: varied for name in searches}
    assert not any(args.variants for args in asked[: -len(searches)])
    runs = [args for args in asked if not (args.search or args.variants)]
    given = [(args.dataset, arm, args.seeds, args.steps) for args in runs for arm in args.arms]
    expected = [(name, arm, [0], LEAST) for name in DATA.keys() - searches.keys() for arm in DIVERSE]
    for name in searches:
        expected += [(name, arm, [*range(SEEDS)], whole_steps(name)) for arm in PRIMARY]
        others = ARMS.keys() - set(PRIMARY) if DATA[name].images is None else ()
        expected += [(name, arm, [0], LEAST) for arm in others]
    assert sorted(given) == sorted(expected)

    assert [words[1] for words in lines[len(asked) :]] == ["scripts.compare"] * 6
    drawn = [compare.parse(words[2:]) for words in lines[len(asked) :]]
    for way in (None, *BESIDE):
        folders = [folder for args in drawn if args.by == way for folder in args.folders]
        assert sorted(folders) == sorted(logs / name for name in DATA)
    for name in {DATA[name].images or name for name in searches}:  # its own would give figures that do not compare
        weights = f"{name}/metric.safetensors"
        assert (logs / weights).read_bytes() == (root / "benchmarks" / "miniature" / weights).read_bytes()


def test_a_finished_run_is_not_continued_by_another_training(places, monkeypatch, capsys):
    """Longer, or with points in between: its curve would be of two trainings, its log lost."""
    given = ("none", "--lr", "1e-3", "--seeds", "12")
    run(places, *given)
    old = log(places, "none-12")
    with pytest.raises(ValueError, match=r"none-12\.json is finished at step 2, without points at 4; --again moves it"):
        run(places, *given, more=("--steps", "4"))
    shutil.rmtree(places / "root" / "runs" / "fashion" / "none-12")
    with pytest.raises(ValueError, match=r"none-12\.json is finished at step 2, without points at 4; --again moves it"):
        run(places, *given, more=("--steps", "4"))
    other = ("none", "--lr", "2e-3", "--seeds", "12")  # of which its settings say more
    with pytest.raises(ValueError, match=r"none-12\.json has other settings, lr: 0\.001 and 0\.002; --again"):
        run(places, *other, more=("--steps", "4"))
    with pytest.raises(ValueError, match=r"none-12\.json is finished at step 2, without points at 1; --again"):
        run(places, *given, more=("--steps", "1"))
    points(monkeypatch, (1,))
    with pytest.raises(ValueError, match=r"without points at 1; --again"):
        run(places, *given)
    assert log(places, "none-12") == old
    run(places, *given, "--again")
    assert [point["step"] for point in log(places, "none-12")["curve"]] == [1, 2]
    assert log(places, f"other/{old['made']['date'][:10]}/none-12") == old
    capsys.readouterr()
    run(places, *given)
    assert "$" not in capsys.readouterr().out


def test_a_run_is_not_continued_from_beyond_its_steps(places, monkeypatch):
    """Its last weights would be removed, and other ways and copies be those of another training."""
    given, arm = ("--lr", "1e-3", "--scale", "6", "--seeds", "20"), "nearest-10"
    points(monkeypatch, (2,))
    monkeypatch.setitem(ARMS, arm, replace(ARMS[arm], variants=WAYS))
    run(places, arm, *given, more=("--steps", "4"))
    old = log(places, f"{arm}-20")
    with pytest.raises(ValueError, match=rf"{arm}-20\.json ends at step 4, beyond --steps 2; --again moves it"):
        run(places, arm, *given, "--variants")
    assert log(places, f"{arm}-20") == old
    assert (places / "root/runs/fashion" / f"{arm}-20" / "checkpoints/0000004-ema.pt").is_file()
    run(places, arm, *given, "--again")
    assert [point["step"] for point in log(places, f"{arm}-20")["curve"]] == [2]
    assert log(places, f"other/{old['made']['date'][:10]}/{arm}-20") == old


def test_a_run_of_the_search_that_lacks_points_is_not_taken(places, monkeypatch):
    given = ("none", "--lr", "5e-3")
    run(places, *given, "--search")
    points(monkeypatch, (1,))
    (places / "logs/fashion/none-0.json").unlink(missing_ok=True)
    shutil.rmtree(places / "root/runs/fashion/none-0", ignore_errors=True)
    run(places, *given)
    assert [point["step"] for point in log(places, "none-0")["curve"]] == [1, 2]


def test_a_run_that_was_cut_off_goes_on_unless_its_weights_are_lost(places, monkeypatch, capsys):
    """Its copies are then of the training that its curve is of."""

    def cut(*given):
        raise KeyboardInterrupt

    given = ("none", "--lr", "1e-3", "--seeds", "30")
    for lost in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(miniature_run.Run, "audit", cut)
            with pytest.raises(KeyboardInterrupt):
                run(places, *given)
        found = log(places, "none-30")
        assert not found.keys() & {"copies", "copies_by"}
        if lost:
            shutil.rmtree(places / "root/runs/fashion/none-30")
        else:  # cut off within the samples
            samples = places / "root/samples/fashion/none-30"
            (samples / "2/samples.npz").unlink()
            shutil.rmtree(samples / "2-heun-50")
        capsys.readouterr()
        run(places, *given)
        assert capsys.readouterr().out.count("$ python train.py") == lost
        assert log(places, "none-30")["copies_by"]["heun-50"] != log(places, "none-30")["copies"]
        assert (log(places, "none-30")["made"] == found["made"]) != lost
        (places / "logs/fashion/none-30.json").unlink()
        shutil.rmtree(places / "root/runs/fashion/none-30")
