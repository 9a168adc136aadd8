"""The demo's path at tiny size, by the script itself; only its `python` has imported the libraries beforehand."""

import json
import os
import shutil
import subprocess

import pytest
from PIL import Image

from memory.files import sha256
from scripts import make_assets


def test_demo(root, environment, tmp_path):
    words = ["--source", str(root / "assets" / "fashion-mnist"), "--out", str(tmp_path / "images")]
    make_assets.main(["images", *words, "--train", "200", "--test", "1"])
    small = {"SOURCE": str(tmp_path / "images"), "STEPS": "4", "K": "8", "IMAGES": "8", "SHIPPED": "9"}
    out = tmp_path / "demo"
    subprocess.run(["bash", "scripts/demo.sh", out], check=True, cwd=root, env={**environment, **small}, timeout=300)

    shipped = json.loads((out / "shipped" / "samples.json").read_text())
    assert shipped["settings"]["checkpoint"] == sha256(root / "assets" / "gmem-fashion-mnist" / "model.safetensors")
    assert Image.open(out / "shipped.png").size == (
        8 * (2 * 2 * 32 + 4) + 4,
        26 + 2 * (2 * 32 + 4) + 4,
    )  # under a title

    table = {path.stem: json.loads(path.read_text()) for path in (out / "metrics").glob("*.json")}
    assert table.keys() == {"held-out", "sde", "euler"}
    assert all(result["num_samples"] == 8 for result in table.values())
    assert (
        table["held-out"]["metrics"]["FD-efficientnet-lite0@96"] < table["sde"]["metrics"]["FD-efficientnet-lite0@96"]
    )
    assert table["sde"]["same_family_as_snippets"]
    assert Image.open(out / "neighbours.png").size == (
        8 * (2 * 2 * 32 + 4) + 4,
        2 * 32 + 8,
    )  # 8 pairs, zoom 2, frames 4
    assert len(list((out / "samples" / "4-steps" / "euler").glob("0*.png"))) == 8


@pytest.mark.parametrize("new", [True, False])
def test_an_environment_is_made_by_a_python_that_can_use_it(new, root, tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(root / "scripts" / "setup.sh", tmp_path / "scripts")
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    made = "mkdir -p .venv/bin && touch .venv/bin/activate && ln -s ../../bin/python3 .venv/bin/pip"
    python.write_text(f'#!/bin/sh\n[ "$1" != - ] || exit {int(not new)}\n[ "$2" != venv ] || {{ {made}; }}\n')
    python.chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to("python3")
    shell = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    for _ in range(2):
        done = subprocess.run(["bash", "-euc", "source scripts/setup.sh"], cwd=tmp_path, env=shell, check=False)
        assert done.returncode == int(not new)
        assert (tmp_path / ".venv").exists() == new
