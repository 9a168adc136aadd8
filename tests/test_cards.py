"""The recipes within the memory of a small card, tiny and on a CPU, and the `python` that holds them to it."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import cards, own
from benchmarks.cards import STAGES, command_of, main
from dataset import LatentDataset

TOOK = {"command": "x", "seconds": 1.0, "peak_gb": 1.5, "reserved_gb": 2.5}


@pytest.fixture
def unlimited(root, environment, monkeypatch):
    """In the place of the limited `python` one that has imported the libraries, and what the other would note."""

    def limited(folder, variables):
        folder.mkdir(parents=True)
        notes = folder / "notes.jsonl"
        notes.write_text(json.dumps(TOOK) + "\n")
        return {**environment, **{name: str(value) for name, value in variables.items()}}, notes

    monkeypatch.chdir(root)
    monkeypatch.setattr(cards, "limited", limited)


def small(folder, *more):
    return ["--small", "--work", str(folder), "--out", str(folder / "out.json"), *more]


def test_stages_at_a_tiny_size(tmp_path, unlimited, capsys):
    stages = [stage for stage in STAGES if not stage.startswith("train-")]  # those are the third one, varied
    main(small(tmp_path, "--at-once", "2", "--stages", *stages))
    result = json.loads((tmp_path / "out.json").read_text())
    assert [(row["stage"], row["status"]) for row in result["stages"]] == [(stage, 0) for stage in stages]
    assert all((row["peak_gb"], row["reserved_gb"]) == (1.5, 2.5) and row["seconds"] > 0 for row in result["stages"])
    assert (result["limit_gib"], result["processes"]) == (22, 1)
    assert f"--gpus 1 --stages {' '.join(stages)} --at-once 2 --small --work DIR" in result["command"]
    assert str(tmp_path) not in json.dumps(result)
    logs = {stage: (tmp_path / f"{stage}.log").read_text() for stage in stages}
    assert "finished at step 2" in logs["train"]
    assert "16 snippets" in logs["bank"]
    assert "4 images in" in logs["sample"]
    assert "FID" in logs["evaluate"]
    assert not any((tmp_path / stage).exists() for stage in stages)  # whose checkpoints fill a disk
    assert {row["stage"]: row["grids"] for row in result["stages"] if "grids" in row} == {"train": 1}
    shown = capsys.readouterr().out
    assert "2.50" in shown
    assert "without its grid" not in shown


def test_a_stage_that_fails_is_recorded_and_shown(tmp_path, unlimited, monkeypatch, capsys):
    words = {"train-b": ["bash", "-c", "echo the GPU is too small >&2; exit 2"], "sample": ["true"], "train": ["true"]}
    monkeypatch.setattr(cards, "make_data", lambda *given: None)
    monkeypatch.setattr(cards, "command_of", lambda stage, *given: ({}, words[stage]))
    with pytest.raises(SystemExit, match="not every stage ended well"):
        main(small(tmp_path, "--stages", *words))
    result = json.loads((tmp_path / "out.json").read_text())
    assert [(row["status"], row.get("grids")) for row in result["stages"]] == [(2, 0), (0, None), (0, 0)]
    shown = capsys.readouterr().out
    assert "the GPU is too small" in shown
    assert re.findall(r"(\S+), without its grid of samples", shown) == ["train"]  # of the other its status says more


def test_a_folder_that_is_not_empty_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "make_data", lambda *given: pytest.fail("data were made"))
    (tmp_path / "earlier").mkdir()
    with pytest.raises(ValueError, match=r"--work .*: expected an empty folder"):
        main(small(tmp_path))


def test_the_stages_are_the_recipes_with_a_small_cards_settings(tmp_path):
    commands = {stage: command_of(stage, tmp_path, tmp_path / stage, small=False) for stage in STAGES}
    variables, words = commands["train"]
    assert words[:2] == ["bash", "scripts/train-gmem-xl.sh"]
    assert (variables["MICRO_BATCH"], variables["STEPS"]) == (16, 16)
    assert not {"BATCH", "ALIGN", "MODEL", "SIZE"} & set(variables)  # 256, 0.5, SiT-XL/2, 256
    assert commands["train-checkpointed"][1] == [*words, "--checkpoint-activations"]
    assert "MICRO_BATCH" not in commands["train-b"][0]
    assert "K" not in commands["bank"][0]
    assert all("--compile" in commands[stage][1] for stage in ("encode", "sample"))


def test_arrays_that_no_stage_reads_are_holes(tmp_path):
    codec = {"latent_shape": [4, 8, 8], "moments_shape": [8, 8, 8], "dtype": "float16", "image_channels": 3}
    for complete in (True, False):
        path = tmp_path / str(complete)
        cards.make_store(path, 20, codec, "some", 5, complete)
        latents = (path / "latents.npy").stat()
        assert (latents.st_blocks * 512 >= latents.st_size) == complete
        store = LatentDataset(path, "some", images=complete)
        assert store.features.std() == pytest.approx(12**-0.5, rel=0.2)
        assert np.any(store.latents) == np.any(store.labels) == complete
        assert store.labels.max() < 1000
    assert len(np.unique(LatentDataset(tmp_path / "True", images=True).images)) == 256


def test_recipes_take_the_limited_python(root, tmp_path, monkeypatch):
    """Even where no environment is active and .venv lies ready; it notes what its commands took."""
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    shutil.copytree(root / "scripts", tmp_path / "scripts")
    active = tmp_path / ".venv" / "bin"
    active.mkdir(parents=True)
    (active / "python").symlink_to(sys.executable)
    (active / "activate").write_text(f'PATH="{active}:$PATH"\n')
    environment, notes = own.limited(tmp_path, {"NPROC": 1})
    (tmp_path / "leave.py").write_text("import sys\nsys.exit(3)\n")
    recipe = f"source scripts/launch.sh; launch {tmp_path}/leave.py"
    assert subprocess.run(["bash", "-c", recipe], cwd=tmp_path, env=environment).returncode == 3
    assert json.loads(notes.read_text())["command"].endswith("leave.py")
