"""The encoder that samples are scored by: its loss against arithmetic, and that it learns what labels it never saw."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from models.encoder import load_encoder
from scripts import encode_dataset, make_assets
from scripts.train_metric_encoder import contrastive_loss, main, random_view


def test_loss_is_the_paper_s():
    first, second = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    rows = [row / row.norm() for row in (*first, *second)]
    total = 0.0
    for i, row in enumerate(rows):
        others = [math.exp(float(row @ other) / 0.5) for j, other in enumerate(rows) if j != i]
        partner = math.exp(float(row @ rows[(i + 3) % 6]) / 0.5)
        total -= math.log(partner / sum(others))
    assert contrastive_loss(first, second, 0.5).item() == pytest.approx(total / 6, rel=1e-5)


def test_views_differ_and_keep_what_is_seen():
    torch.manual_seed(0)
    ramp = torch.linspace(-1, 1, 32).expand(64, 3, 32, 32)  # brighter to the right
    views = random_view(ramp, 48)
    assert views.shape == (64, 3, 48, 48)
    assert (views[..., 36:].mean((1, 2, 3)) > views[..., :12].mean((1, 2, 3))).all()
    assert views.mean((1, 2, 3)).std() > 0.05


def test_it_learns_and_is_read_by_the_evaluator(root, tmp_path):
    words = ["--source", str(root / "assets" / "fashion-mnist"), "--out", str(tmp_path / "images")]
    make_assets.main(["images", *words, "--train", "400", "--test", "1"])
    encode = [str(tmp_path / "images"), "--out", str(tmp_path / "store"), "--codec", "pixels", "--image-size", "32"]
    encode_dataset.main([*encode, "--keep-images", "--holdout", "0.25", "--workers", "0"])
    out = tmp_path / "metric.safetensors"
    main(["--store", str(tmp_path / "store"), "--out", str(out), "--steps", "20", "--batch-size", "32"])
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["last_loss"] < facts["first_loss"]
    assert facts["nearest_has_the_label"]["trained"] > 0.4
    assert load_encoder("resnet18@64", out).dim == 512
    state = load_file(out)
    assert {tensor.dtype for tensor in state.values() if tensor.ndim > 1} == {torch.float16}
    assert state["bn1.running_var"].dtype == torch.float32
    assert state["fc.weight"].count_nonzero() == 0  # no part of the features


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.pt"], "ends in .safetensors"),
        (["--out", "x.safetensors", "--steps", "1"], "--steps 1: expected at least 2"),
        (["--out", "x.safetensors", "--model", "resnet"], "--model resnet: timm"),
        (["--out", "x.safetensors", "--lr", "0"], "--lr and --temperature above 0"),
    ],
)
def test_bad_flags_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        main(["--store", "data/x", *words])
    assert message in capsys.readouterr().err
