"""Benchmarks refuse to time what computes something else."""

from pathlib import Path

import pytest
import torch

from benchmarks import bench_evaluate, bench_kmeans, bench_train
from benchmarks.path import facts, parser
from evaluations.inception import Features
from memory.provenance import code_version


def test_a_search_with_a_wrong_label_is_not_timed(monkeypatch):
    bench_kmeans.check(subset=50, k=20, dim=7, device=torch.device("cpu"))
    monkeypatch.setattr(bench_kmeans, "assign", lambda *given: bench_kmeans.assign_plain(*given).clamp(max=18))
    with pytest.raises(AssertionError, match="labels of 50 differ"):
        bench_kmeans.check(subset=50, k=20, dim=7, device=torch.device("cpu"))


@pytest.mark.parametrize("wrong", [None, *Features._fields])
def test_a_network_with_other_features_on_a_gpu_is_not_timed(wrong, monkeypatch):
    class Network:
        """Gives its images' means, one of them off by a hundredth on a GPU."""

        def __init__(self, weights, device):
            self.factors = [1.01 if device == "cuda" and name == wrong else 1.0 for name in Features._fields]

        def __call__(self, images):
            return Features(*(factor * images.double().mean((1, 2, 3)) for factor in self.factors))

    monkeypatch.setattr(bench_evaluate, "Inception", Network)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    if wrong is None:
        assert bench_evaluate.check(Path("weights")) == dict.fromkeys(Features._fields, 0.0)
    else:
        with pytest.raises(AssertionError, match=wrong):
            bench_evaluate.check(Path("weights"))


def test_the_record_of_whole_commands_names_its_code_and_no_folder(tmp_path):
    words = ["--gpus", "2", "--work", tmp_path / "work", "--out", tmp_path / "x.json"]
    record = facts(parser("").parse_args(list(map(str, words))), "own")
    assert record["code"] == code_version()
    assert (record["command"], record["processes"]) == ("python -m benchmarks.own --gpus 2 --work DIR --out FILE", 2)
    assert str(tmp_path) not in str(record)


def test_gradients_further_from_float32_than_the_plain_ones_are_not_timed(tmp_path):
    """By a bias that stands for a kernel that is wrong."""
    bench_train.make_data(tmp_path, images=4)
    trainer = bench_train.make_trainer(tmp_path, "SiT-Ti/2", 2, ["--workers", "0"])
    plain = bench_train.copy.deepcopy(trainer.network)
    trainer.prepare()
    assert bench_train.check(trainer, plain)["gradients, train.py"] < 1e-5
    trainer.network.blocks[3].mlp.fc1.bias.data += 0.1
    with pytest.raises(AssertionError, match=r"gradients, train\.py"):
        bench_train.check(trainer, plain)
