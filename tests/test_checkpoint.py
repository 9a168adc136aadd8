"""Reading checkpoints: the round trip, and every file that is not what it should be."""

import argparse

import pytest
import torch

from memory.bank import MemoryBank
from memory.files import sha256
from models.checkpoint import find_checkpoint, init_weights, load_model, read_checkpoint
from models.sit import SiT_models


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of random weights with its bank."""
    torch.manual_seed(0)
    model = SiT_models["SiT-Ti/2"](input_size=8, snippet_dim=12)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    bank = tmp_path / "bank" / "bank.pth"
    MemoryBank(torch.randn(5, 12), [1, 2, 3, 4, 5], meta={"encoder": "toy"}).save(bank)
    checkpoint = {
        "ema": model.state_dict(),
        "model": {name: tensor + 1 for name, tensor in model.state_dict().items()},
        "opt": {},
        "model_config": model.config,
        "steps": 7,
        "args": {"seed": 0},
        "codec": {"name": "pixels"},
        "encoder": "toy",
        "bank": {"path": str(bank), "sha256": sha256(bank), "k": 5, "dim": 12},
        "store": {"path": "data/toy", "fingerprint": "f"},
        "image_size": 8,
    }
    path = tmp_path / "run" / "checkpoints" / "0000007.pt"
    path.parent.mkdir(parents=True)
    torch.save(checkpoint, path)
    return path, checkpoint, model


def change(path, checkpoint, **items):
    torch.save({**checkpoint, **items}, path)


def test_round_trip(saved):
    path, _, model = saved
    loaded, config, bank = load_model(path)
    assert not loaded.training
    assert torch.equal(loaded.final_layer.linear.weight, model.final_layer.linear.weight)
    assert torch.equal(load_model(path, weights="model")[0].pos_embed, model.pos_embed + 1)
    assert loaded.config == model.config == config["model_config"]
    assert config["checkpoint"] == {"path": str(path), "sha256": sha256(path), "weights": "ema"}
    assert config["steps"] == 7
    assert not config.keys() & {"model", "ema", "opt"}
    assert bank.freq.tolist() == [1, 2, 3, 4, 5]


def test_a_run_gives_its_latest_state(saved):
    path, checkpoint, _ = saved
    for name in ("0000003.pt", "0000012-ema.pt", "2024_bank.pt", "7.5.pt"):
        torch.save(checkpoint, path.with_name(name))
    assert find_checkpoint(path.parent.parent).name == "0000012-ema.pt"
    torch.save(checkpoint, path.with_name("0000012.pt"))
    assert find_checkpoint(path.parent).name == "0000012.pt"
    (path.parent / "empty").mkdir()
    for name in ("nothing", "empty"):
        with pytest.raises(
            ValueError, match=f"{name}: no such file, nor a folder .*give the --out of train.py.*fetch.sh"
        ):
            find_checkpoint(path.parent / name)


def test_what_is_there_instead_of_a_checkpoint_is_named(saved):
    path, checkpoint, _ = saved
    torch.save(checkpoint, path.with_name("0000003.pt"))
    with pytest.raises(ValueError, match=rf"\({path.parent} has 0000003\.pt, 0000007\.pt\); give the --out"):
        find_checkpoint(path.with_name("0000005.pt"))
    runs = path.parents[2]
    with pytest.raises(ValueError, match=rf"checkpoint {runs}: .*\(a folder of runs: name one of run\); give"):
        find_checkpoint(runs)


def test_a_bank_is_named_checked_and_replaceable(saved, tmp_path):
    path, checkpoint, _ = saved
    bank = checkpoint["bank"]["path"]
    MemoryBank(torch.randn(5, 12), [1] * 5, meta={"encoder": "toy"}).save(bank)
    with pytest.raises(ValueError, match="is not the one of training"):
        load_model(path)
    assert load_model(path, bank=bank)[2].freq.tolist() == [1] * 5
    hashes = {"sha256": sha256(bank), "freq_sha256": "0" * 64}
    change(path, checkpoint, bank={**checkpoint["bank"], **hashes})
    with pytest.raises(ValueError, match=r"bank.freq is not the one of training"):
        load_model(path)
    assert load_model(path, bank=False)[2] is None
    other = tmp_path / "other.pth"
    MemoryBank(torch.randn(5, 13), [1] * 5).save(other)
    with pytest.raises(ValueError, match="dimension 13; the checkpoint takes 12"):
        load_model(path, bank=other)
    MemoryBank(torch.randn(5, 12), [1] * 5, meta={"encoder": "another"}).save(other)
    with pytest.raises(ValueError, match="made by encoder 'another'; the checkpoint's is 'toy'"):
        load_model(path, bank=other)
    change(path, checkpoint, encoder=None)  # of a published file, which names none
    assert load_model(path, bank=other)[2].meta["encoder"] == "another"
    change(path, checkpoint, bank={**checkpoint["bank"], **hashes})
    (tmp_path / "bank" / "bank.freq").unlink()
    with pytest.raises(ValueError, match=r"bank.freq is missing"):
        load_model(path)
    (tmp_path / "bank" / "bank.pth").unlink()
    with pytest.raises(ValueError, match="is not there: pass its place as --bank"):
        load_model(path)
    change(path, checkpoint, bank=None)
    with pytest.raises(ValueError, match="names no memory bank"):
        load_model(path)


def test_a_bank_of_another_store_is_warned_of(saved, tmp_path, recwarn):
    """Not the checkpoint's own, and not one, or a checkpoint, that says nothing of its store."""
    path, checkpoint, _ = saved
    other = tmp_path / "other" / "bank.pth"
    for meta in ({}, {"store_fingerprint": "f", "store": "data/toy"}):
        MemoryBank(torch.randn(5, 12), [1] * 5, meta=meta).save(other)
        load_model(path, bank=other)
    MemoryBank(torch.randn(5, 12), [1] * 5, meta={"store_fingerprint": "g", "store": "data/new"}).save(other)
    change(path, checkpoint, store=None)
    load_model(path, bank=other)
    assert not recwarn.list
    change(path, checkpoint)
    stores = "data/new, than the checkpoint was trained on, data/toy"
    with pytest.warns(UserWarning, match=f"--bank {other} was built from another store, {stores}: its snippets are of"):
        load_model(path, bank=other)


def test_weights_of_another_network_are_listed(saved):
    path, checkpoint, model = saved
    state = {**model.state_dict(), "extra": torch.zeros(2)}
    state["pos_embed"] = torch.zeros(1, 4, 192)
    del state["x_embedder.proj.bias"]
    change(path, checkpoint, ema=state)
    with pytest.raises(ValueError, match=r"3 differences") as error:
        load_model(path)
    for line in ("missing     x_embedder.proj.bias", "unexpected  extra", "has (1, 4, 192), the network (1, 16, 192)"):
        assert line in str(error.value)
    change(path, checkpoint, model_config={**model.config, "model": "SiT-XXL/2"})
    with pytest.raises(ValueError, match="model 'SiT-XXL/2': expected one of SiT-S/1"):
        load_model(path)


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"steps": "7"}, r"0000007\.pt: steps is '7', expected int"),
        ({"args": None}, "args is None, expected dict"),
        ({"bank": {"sha256": None}}, r"bank\.path is None, expected str"),
    ],
)
def test_facts_of_another_form_are_named(saved, facts, told):
    path, checkpoint, _ = saved
    change(path, checkpoint, **facts)
    with pytest.raises(ValueError, match=told):
        load_model(path)


def test_init_takes_what_fits(saved):
    path, _, model = saved
    other = SiT_models["SiT-Ti/2"](input_size=8, condition="label", num_classes=3)
    skipped = init_weights(other, path)
    assert torch.equal(other.final_layer.linear.weight, model.final_layer.linear.weight)
    assert {line.split()[1] for line in skipped} == {
        "y_embedder.embedding_table.weight",
        "condition_projection.linear.weight",
        "condition_projection.linear.bias",
    }
    with pytest.raises(ValueError, match="no tensor of it fits"):
        init_weights(torch.nn.Linear(2, 2), path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b'{"args": {}}', b"PK\x03\x04 half a zip"])
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "0000001.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as a torch.*; give a run's folder or one of its checkp"):
        read_checkpoint(path)


def test_objects_and_foreign_dictionaries_are_refused(tmp_path):
    path = tmp_path / "0000001.pt"
    torch.save({"ema": {}, "model_config": argparse.Namespace(a=1)}, path)
    with pytest.raises(ValueError, match="plain values"):
        read_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="it holds state_dict; expected model_config"):
        read_checkpoint(path)
    torch.save(7, path)
    with pytest.raises(ValueError, match="it holds int; expected model_config"):
        read_checkpoint(path)


def test_a_truncated_checkpoint(saved):
    path, _, _ = saved
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(path)
