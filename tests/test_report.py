"""Results of the whole path on tiny real data: where each number comes from, the report, the curve, evaluate.sh."""

import copy
import gzip
import json
import shutil
import struct
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

import sample_ddp
import train
from evaluations import evaluator
from memory import build_bank
from memory.command import named
from memory.files import sha256
from models.published import GMEM, REPA, SIT
from models.sit import SiT_models
from scripts import cost, curve, encode_dataset, export, report
from scripts.quoted import QUOTED

ENCODER = "test_vit@32"
COUNT = 60  # images, of which a quarter is held out


def words(*parts):
    return [str(word) for part in parts for word in (part.split() if isinstance(part, str) else [part])]


@pytest.fixture(scope="module")
def made(root, tmp_path_factory):
    """Store, bank, run, samples and the evaluator's JSON, by the real commands."""
    folder = tmp_path_factory.mktemp("made")
    with gzip.open(root / "assets" / "fashion-mnist" / "train-images-idx3-ubyte.gz") as file:
        file.read(16)
        clothes = file.read(COUNT * 28 * 28)
    (folder / "source").mkdir()
    with gzip.open(folder / "source" / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">4I", 0x0803, COUNT, 28, 28) + clothes)
    with gzip.open(folder / "source" / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">2I", 0x0801, COUNT) + bytes(COUNT))
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), folder / "vit.pth")
    store, bank, run, samples = (folder / name for name in ("data", "bank", "run", "samples"))
    options = f"--codec pixels --image-size 28 --views 2 --holdout 0.25 --keep-images --workers 0 --encoder {ENCODER}"
    encode_dataset.main(words(folder / "source", "--out", store, "--encoder-weights", folder / "vit.pth", options))
    build_bank.main(words("--store", store, "--out", bank, "--k 8 --passes 2"))
    often = "--log-every 1 --save-every 2 --snapshot-every 2 --keep 1 --sample-every 0 --eval-every 0 --workers 0"
    command = words("--store", store, "--bank", bank, "--out", run, f"--model SiT-Ti/2 --batch-size 4 {often}")
    train.main([*command, "--steps", "2"])
    train.main([*command, "--steps", "4"])
    draw = "--num-images 8 --steps 3 --format npz"
    sample_ddp.main(words("--checkpoint", run / "checkpoints" / "0000004.pt", "--out", samples, draw))
    result = folder / "result.json"
    network = ["--encoder", "test_vit", "--encoder-weights", folder / "vit.pth"]
    evaluator.main(words(store, samples, "--out", result, *network))
    return SimpleNamespace(
        folder=folder, store=store, bank=bank, run=run, samples=samples, result=result, network=words(*network)
    )


def read(path):
    return json.loads(path.read_text())


def lines(page, heading):
    """The cells of each table row below a heading."""
    part = page.split(f"## {heading}")[1].split("\n## ")[0]
    table = [line for line in part.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def pages(capsys, *sources):
    report.main([str(source) for source in sources])
    return capsys.readouterr().out


# Provenance


def test_every_fact_of_a_number_is_in_its_json(made):
    """From the evaluator's JSON alone: hashes of weights, bank, store and reference, and how everything was run."""
    result = read(made.result)
    settings, run = result["samples"][0]["made"]["settings"], result["samples"][0]["made"]["run"]
    assert settings["checkpoint"] == sha256(made.run / "checkpoints" / "0000004.pt")
    assert settings["bank"]["bank.pth"] == sha256(made.bank / "bank.pth")
    assert run["trained"]["store"]["fingerprint"] == read(made.store / "meta.json")["fingerprint"]
    assert run["trained"]["bank"]["sha256"] == settings["bank"]["bank.pth"]
    assert result["reference"]["sha256"] == sha256(made.store / "images.npy")
    assert (settings["sampler"], settings["steps"], settings["seed"]) == ("sde", 3, 0)
    assert (settings["guidance"], settings["snippets"], result["num_samples"]) == (None, "noise", 8)
    parts = [result["run"], run, read(made.bank / "bank.json")["run"], *read(made.store / "meta.json")["runs"]]
    for part in parts + read(made.run / "config.json")["runs"]:
        assert part["code"] == parts[0]["code"]
        assert part["command"]
        assert part["device"]
        assert part["date"]
        assert part["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert result["protocol"] == "8 images, sde 3"


def test_the_same_commands_again_leave_everything_as_it_is(made):
    before = {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()}
    options = f"--codec pixels --image-size 28 --views 2 --holdout 0.25 --keep-images --workers 0 --encoder {ENCODER}"
    source, weights = made.folder / "source", made.folder / "vit.pth"
    encode_dataset.main(words(source, "--out", made.store, "--encoder-weights", weights, options))
    build_bank.main(words("--store", made.store, "--out", made.bank, "--k 8 --passes 2"))
    checkpoint = made.run / "checkpoints" / "0000004.pt"
    sample_ddp.main(words("--checkpoint", checkpoint, "--out", made.samples, "--num-images 8 --steps 3 --format npz"))
    assert {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()} == before


def test_a_model_card_names_data_and_code(made, tmp_path):
    export.main(words(made.run, "--out", tmp_path / "st"))
    card = (tmp_path / "st" / "README.md").read_text()
    assert f"fingerprint {read(made.store / 'meta.json')['fingerprint']}" in card
    assert read(made.result)["run"]["code"].partition("+")[0] in card


# Cost


@pytest.mark.parametrize(("name", "gmacs"), [("S", 6.06), ("B", 23.0), ("L", 80.7), ("XL", 118.6)])
def test_multiply_adds_are_the_published_ones(name, gmacs):
    network = cost.network({"model": f"SiT-{name}/2", "condition": "label"})
    assert cost.multiply_adds(network) / 1e9 == pytest.approx(gmacs, rel=2e-3)


def test_multiply_adds_are_those_of_a_forward():
    """Counted by the modules that a forward meets, for a network with snippets."""
    total = 0

    def count(module, args, output):
        nonlocal total
        if isinstance(module, torch.nn.Linear):
            total += args[0].numel() * module.out_features
        elif isinstance(module, torch.nn.Conv2d):
            total += output.numel() * module.weight[0].numel()

    model = SiT_models["SiT-Ti/2"](input_size=28, in_channels=1, snippet_dim=64).eval()
    for module in model.modules():
        module.register_forward_hook(count)
    model(torch.zeros(1, 1, 28, 28), torch.zeros(1), torch.ones(1, 64))
    assert cost.multiply_adds(model) == total + 6 * 2 * 196**2 * 192


def test_encoding_is_counted_through_codec_and_encoder():
    """A ViT-B/14 of 224 px takes 21.96 G multiply-adds in products with tokens, 1.2 G in attention."""
    vit = cost.encoder_multiply_adds("vit_base_patch14_dinov2.lvd142m", 224)
    products = 12 * 257 * 12 * 768**2 + 256 * 768 * 3 * 14**2
    assert vit == products + 12 * 2 * 257**2 * 768
    meta = {"codec": {"name": "pixels"}, "image_size": 256, "num_images": 10, "num_views": 2}
    meta["encoders"] = {"e": {"model": "vit_base_patch14_dinov2.lvd142m", "input_size": 224}}
    assert cost.encoding_flop(meta, "e") == 2 * 20 * vit
    meta["codec"]["name"] = "sd-vae-ft-mse"
    assert cost.encoding_flop(meta, "e") > 2 * 20 * (vit + 100e9)
    meta["codec"]["name"] = "nowhere"
    assert cost.encoding_flop(meta, "e") is None


def test_hours_of_training_count_processes_and_no_lost_steps(tmp_path):
    """100 steps at 2 images/s on one process, then, after a stop at 150, 100 at 4 images/s on two."""
    runs = [{"from_step": 0, "processes": 1}, {"from_step": 150, "processes": 2}]
    (tmp_path / "config.json").write_text(json.dumps({"args": {"batch_size": 8}, "runs": runs}))
    log = [
        {"step": 100, "images_per_second": 2},
        {"step": 100, "holdout_loss": 1},
        {"step": 200, "images_per_second": 4},
    ]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))
    assert cost.training_hours(tmp_path) == pytest.approx((100 * 8 / 2 + 2 * 100 * 8 / 4) / 3600)
    (tmp_path / "config.json").write_text(json.dumps({"args": {"batch_size": 8}}))
    assert cost.training_hours(tmp_path) is None


# The report


def test_without_results_every_line_has_its_command(root, capsys):
    page = pages(capsys)
    rows = lines(page, "Published and reproduced")
    quoted = [row for row in rows if row["figures are"] == "quoted"]
    assert len(quoted) == len(QUOTED)
    assert {row["FID"] for row in quoted} >= {"3.56", "5.75", "8.26", "5.9"}
    for row in rows:
        if row["figures are"] != "quoted":
            assert not any(row[name] for name in report.METRICS)
            script = next(word for word in row["from"].strip("`").split() if word.startswith("scripts/"))
            assert (root / script).is_file(), script
    assert "## Cost" not in page


def test_a_result_is_traced_to_all_that_it_cost(made, capsys):
    page = pages(capsys, made.result, made.bank, made.store, made.run)
    (row,) = lines(page, "Cost")
    network = SiT_models["SiT-Ti/2"](input_size=28, in_channels=1, snippet_dim=64)
    images = read(made.store / "meta.json")["num_images"]
    assert row["network floats"] == f"{sum(parameter.numel() for parameter in network.parameters()):,}"
    assert (row["bank floats"], row["condition bits"]) == (str(8 * 64), "3.0")
    assert row["encoder"].startswith(ENCODER)
    assert (row["flips"], row["precision"], row["batch"]) == ("yes", "fp32", "4")
    assert float(row["training FLOP"]) == pytest.approx(2 * 3 * cost.multiply_adds(network) * 4 * 4, rel=1e-2)
    assert float(row["bank FLOP"]) == pytest.approx(2 * images * 8 * 64 * 3, rel=1e-2)
    whole = {**read(made.bank / "bank.json"), "rule": "every feature", "iterations": 0}
    assert cost.bank_flop(whole, images) == 0, "nothing is searched for a bank of all features"
    assert float(row["encoding FLOP"]) > 0
    rates = [json.loads(line)["images_per_second"] for line in (made.run / "log.jsonl").read_text().splitlines()]
    assert float(row["training hours"]) == pytest.approx(sum(4 / rate for rate in rates) / 3600, rel=1e-2)
    bank = read(made.bank / "bank.json")["run"]
    assert float(row["bank hours"]) == pytest.approx(bank["seconds"] / 3600, rel=1e-2)
    seconds = read(made.store / "meta.json")["runs"][0]["process_seconds"]
    assert float(row["encoding hours"]) == pytest.approx(seconds / 3600, rel=1e-2)
    alone = lines(pages(capsys, made.result), "Cost")[0]
    assert (alone["encoding hours"], alone["training hours"]) == ("", "")
    assert alone["bank floats"] == row["bank floats"], "the checkpoint names its bank"


def test_a_result_in_the_snippets_family_stands_apart(made, capsys):
    page = pages(capsys, made.result)
    assert "## Other results" not in page
    (row,) = lines(page, "Not for comparison: the network is of the snippets' family")
    metrics = read(made.result)["metrics"]
    assert {name: row[name] for name in metrics} == {name: f"{value:.4g}" for name, value in metrics.items()}
    assert (row["samples"], row["steps"], row["sampled by"]) == ("samples", "4", "sde 3")
    for row in lines(page, "Published and reproduced"):
        assert row["figures are"] == "quoted" or not row["FID"]


@pytest.fixture
def doctored(made, tmp_path):
    """Write a real result as if it were of ImageNet, changed as asked."""

    def write(name, fid, form=None, model="SiT-XL/2", **changes):
        result = copy.deepcopy(read(made.result))
        result["metrics"] = dict.fromkeys(report.METRICS, 0.5) | {"FID": fid}
        result |= {"num_samples": 50_000, "same_family_as_snippets": False}
        result["network"] = {"name": "inception", "sha256": "6726825d0af5"}
        result["reference"] |= {"path": f"anywhere/{report.REFERENCE}"}
        settings, trained = (result["samples"][0]["made"][key] for key in ("settings", "run"))
        trained = trained["trained"]
        settings |= {"evaluations": 250, "training_steps": 2_000_000}
        trained["model_config"] |= {"model": model}
        trained["format"] = form
        for key, value in changes.items():
            place = next(part for part in (settings, trained["args"], result, result["reference"]) if key in part)
            place[key] = value
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
        return tmp_path / f"{name}.json"

    return write


def test_each_result_stands_on_its_line(doctored, capsys):
    label = {"condition": "label"}
    guided = {"by": "null", "scale": 1.8, "interval": [0.0, 0.7], "channels": None}
    files = [
        doctored("ours", 3.61),
        doctored("authors", 3.57, form=GMEM, training_steps=None),
        doctored("repa", 5.91, form=REPA, training_steps=None, **label),
        doctored("repa-guided", 1.43, form=REPA, training_steps=None, guidance=guided, **label),
        doctored("sit", 8.27, form=SIT, training_steps=7_000_000, **label),
        doctored("our-sit-b", 33.1, model="SiT-B/2", training_steps=400_000, **label),
        doctored("our-repa", 7.95, training_steps=400_000, align_coeff=0.5, **label),
    ]
    found, about = {}, None
    for row in lines(pages(capsys, *files), "Published and reproduced"):
        if row["figures are"] == "quoted":
            about = (row[""], row["steps"], row["sampler"])
        elif row["FID"]:
            found[(*about, row["figures are"])] = row["FID"]
    assert found == {
        ("GMem SiT-XL/2", "2,000,000", "SDE 250", "retrained"): "3.61",
        ("GMem SiT-XL/2", "2,000,000", "SDE 250", "re-evaluated"): "3.57",
        ("REPA SiT-XL/2", "4,000,000", "SDE 250", "re-evaluated"): "5.91",
        ("REPA SiT-XL/2", "4,000,000", "SDE 250, guidance 1.8", "re-evaluated"): "1.43",
        ("SiT SiT-XL/2", "7,000,000", "SDE 250", "re-evaluated"): "8.27",
        ("SiT SiT-B/2", "400,000", "SDE 250", "retrained"): "33.1",
        ("REPA SiT-XL/2", "400,000", "SDE 250", "retrained"): "7.95",
    }


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 10_000},
        {"evaluations": 100},
        {"training_steps": 1_000_000},
        {"guidance": {"by": "null", "scale": 1.5, "interval": [0, 1], "channels": None}},
        {"path": "anywhere/validation.npz"},
        {"network": {"name": "inception", "sha256": "other"}},
        {"network": {"name": "an encoder from the hub", "sha256": None}},
    ],
)
def test_what_was_made_otherwise_stands_in_a_table_of_its_own(doctored, capsys, change):
    page = pages(capsys, doctored("x", 3.61, **change))
    assert not any(row["FID"] == "3.61" for row in lines(page, "Published and reproduced"))
    assert [row["FID"] for row in lines(page, "Other results")] == ["3.61"]


def test_results_of_different_protocols_never_share_a_table(doctored, capsys):
    files = [
        doctored("a", 5.1, num_samples=10_000),
        doctored("b", 5.2, num_samples=10_000),
        doctored("c", 5.3, num_samples=5_000),
        doctored("d", 5.4, num_samples=10_000, sha256="f" * 64),
    ]
    page = pages(capsys, *files).split("## Other results")[1].split("## ")[0]
    tables = [part for part in page.split("\n\n") if part.startswith("|")]
    assert [[fid for fid in ("5.1", "5.2", "5.3", "5.4") if f" {fid} " in table] for table in tables] == [
        ["5.1", "5.2"],
        ["5.3"],
        ["5.4"],
    ]
    assert "5,000 samples against" in page
    assert "sha256 ffffffffffff" in page
    with pytest.raises(ValueError, match="two different files are called VIRTUAL_imagenet256_labeled"):
        pages(capsys, doctored("e", 3.6), doctored("f", 3.7, sha256="f" * 64))


def test_a_folder_of_samples_brings_its_results(made, tmp_path, capsys):
    folder = tmp_path / "gmem-1.5"
    folder.mkdir()
    shutil.copy(made.samples / "samples.json", folder)
    page = pages(capsys, folder)
    assert "## Other results" not in page
    for name in (folder / "samples.toy.json", tmp_path / "gmem-1.5.toy.json"):  # of an npz, and of PNG files alone
        shutil.copy(made.result, name)
        assert pages(capsys, folder) == pages(capsys, name)
        name.unlink()
    report.main([str(folder)])
    assert f"{folder} is not scored yet" in capsys.readouterr().err


def test_what_is_no_source_is_named(made, tmp_path):
    with pytest.raises(ValueError, match=r"bank\.json is no result of evaluations"):
        report.main([str(made.bank / "bank.json")])
    result = read(made.result)
    (tmp_path / "controls.json").write_text(
        json.dumps({"rows": {}, "samples": result["samples"], "run": result["run"]})
    )
    with pytest.raises(ValueError, match=r"controls\.json is no result of evaluations"):
        report.main([str(tmp_path / "controls.json")])
    with pytest.raises(ValueError, match="expected a JSON file, or the folder of samples, a bank, a store or a run"):
        report.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("result.json", '"sampler": "sde"', '"sampler": 7', r"made\.settings\.sampler is 7, expected str"),
        ("result.json", '"SiT-Ti/2"', '"SiT-Ti"', r"result\.json, its network: model 'SiT-Ti': expected one of"),
        ("bank/bank.json", '"k": 8', '"k": "8"', r"bank\.json: k is '8', expected int"),
        ("data/meta.json", '"process_seconds"', '"seconds"', r"meta\.json: runs\[0\]\.process_seconds is None"),
        ("data/meta.json", '"model": "test_vit"', '"model": "vi"', "encoder 'vi' is no model of timm"),
        ("run/config.json", '"from_step"', '"from"', r"config\.json: runs\[0\]\.from_step is None, expected int"),
        ("run/log.jsonl", '"images_per_second": ', '"images_per_second": 0, "x": ', r"log\.jsonl: division by zero"),
    ],
)
def test_a_damaged_source_is_named(made, tmp_path, file, old, new, message):
    for name in ("result.json", "bank/bank.json", "data/meta.json", "run/config.json", "run/log.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((made.folder / name).read_text().replace(f"{made.run}/", f"{tmp_path}/run/"))
    sources = [str(tmp_path / name) for name in ("result.json", "bank", "data", "run")]
    report.main(sources)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        report.main(sources)
    assert named(error.value), "a command would print a traceback"


def test_what_makers_need_not_say_leaves_a_cell_empty(made, tmp_path, capsys):
    """The rate of samples, and how a bank was built that others published: its export has hashes alone."""
    result, digest = read(made.result), read(made.bank / "bank.json")["sha256"]
    del result["samples"][0]["made"]["run"]["images_per_second"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "bank.json").write_text(json.dumps({"sha256": digest}))
    (row,) = lines(pages(capsys, tmp_path / "result.json", tmp_path / "bank", made.store), "Cost")
    assert (row["bank FLOP"], row["bank hours"], row["images/s"]) == ("", "", "")
    assert row["encoding FLOP"]


def test_features_that_were_derived_cost_what_they_were_derived_from(made, tmp_path, capsys):
    """And of features that the store no longer has nothing is known."""
    (tmp_path / "store").mkdir()
    meta, result = read(made.store / "meta.json"), read(made.result)
    flop = cost.encoding_flop(meta, ENCODER)
    meta["encoders"]["group"] = {"name": "group", "dim": 64, "derived_from": meta["encoders"][ENCODER]}
    assert cost.encoding_flop(meta, "group") == flop > 0
    (tmp_path / "store" / "meta.json").write_text(json.dumps(meta))
    for encoder, cells in (("group", (f"{flop:.2e}", "group (training")), ("gone", ("", "gone (training"))):
        result["samples"][0]["made"]["settings"]["encoder"] = encoder
        (tmp_path / "result.json").write_text(json.dumps(result))
        (row,) = lines(pages(capsys, tmp_path / "result.json", tmp_path / "store"), "Cost")
        assert row["encoding FLOP"] == cells[0]
        assert row["encoder"].startswith(cells[1])


# The curve


def test_the_curve_keeps_protocols_apart(doctored, tmp_path, capsys):
    for step, fid, count in ((400, 9.1, 10_000), (50, 30.2, 10_000), (100, 20.3, 5_000)):
        protocol = f"{count:,} images, euler 50"
        doctored(f"{step}-{count}", fid, training_steps=step, num_samples=count, protocol=protocol)
    (tmp_path / "other.json").write_text("{}")
    curve.main([str(tmp_path)])
    printed = capsys.readouterr().out
    small, large = printed.split("10,000 images, euler 50")
    assert "5,000 images, euler 50" in small
    assert [fid in small for fid in ("20.3", "30.2", "9.1")] == [True, False, False]
    assert "20.3" not in large
    assert large.index("30.2") < large.index("| 9.1")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: no results.*--quick"):
        curve.main([str(tmp_path / "none")])


# evaluate.sh


def test_evaluate_script_from_end_to_end(made, environment, root, tmp_path):
    """The page on a set of samples; and a run's checkpoints, one of which vanishes while its like is kept."""
    variables = environment | {"IMAGES": "6", "STEPS": "2"}
    script = ["bash", str(root / "scripts" / "evaluate.sh")]

    def call(*arguments):
        done = subprocess.run(
            [*script, *map(str, arguments)], env=variables, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    page = call(made.store, made.bank, made.samples, made.store, tmp_path / "page", *made.network)
    assert (tmp_path / "page" / "card.md").read_text().strip() in page
    for part in ("| random training images ", "| latent ", "Bank of 8 snippets", "4 training steps; sde with 3"):
        assert part in page
    weights, code = sha256(made.run / "checkpoints" / "0000004.pt"), read(made.result)["run"]["code"]
    assert f"Made from: weights {weights[:12]}, bank {sha256(made.bank / 'bank.pth')[:12]}, store " in page
    assert f"sampled by code {code[:12]}, scored by code " in page
    for name in ("controls", "copies"):
        assert read(tmp_path / "page" / f"{name}.json")["run"]["code"]

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "quick").mkdir()
    (run / "config.json").write_bytes((made.run / "config.json").read_bytes())
    for name in ("0000004-ema.pt", "0000004.pt"):
        (run / "checkpoints" / name).symlink_to(made.run / "checkpoints" / name)
    (run / "checkpoints" / "0000002-ema.pt").symlink_to(made.run / "checkpoints" / "0000002-ema.pt")
    (run / "checkpoints" / "0000003.pt").symlink_to(tmp_path / "gone")
    (run / "quick" / "0000002.euler-2-n6.json").write_bytes(made.result.read_bytes())
    printed = call(run, "--quick", *made.network)
    assert "0000002-ema.pt has a result" in printed
    assert "0000003.pt is gone" in printed
    assert "0000004.pt has a result" in printed, "of the snapshot"
    result = read(run / "quick" / "0000004.euler-2-n6.json")
    assert (result["num_samples"], result["protocol"]) == (6, "6 images, euler 2")
    assert result["samples"][0]["made"]["settings"]["training_steps"] == 4
    assert np.isfinite(list(result["metrics"].values())).all()
    left = {"0000002.euler-2-n6.json", "0000004.euler-2-n6.json", "curve.png"}
    assert {path.name for path in (run / "quick").iterdir()} == left
    assert subprocess.run(script, capture_output=True).returncode == 2

    (run / "checkpoints" / "0000005.pt").symlink_to(made.run / "checkpoints" / "0000004.pt")
    for reference, options, message in (
        (tmp_path / "no.npz", made.network, "no.npz: no such file"),
        (made.store, ["--inception", "no.pth"], "--inception no.pth: no such file"),
    ):
        command = [*script, str(run), "--quick", *options]
        failed = subprocess.run(command, env=variables | {"REF": str(reference)}, capture_output=True, text=True)
        assert failed.returncode == 1
        assert message in failed.stderr
        assert {path.name for path in (run / "quick").iterdir()} == left, "nothing is sampled for nothing"
