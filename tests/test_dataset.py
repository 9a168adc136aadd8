"""The store's reader: what is fetched, in which order, and what is refused."""

import fcntl
import json
import pickle
import re
import shutil
import threading
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import dataset
from dataset import LatentDataset, StepSampler, holdout_path, layout, rows_of_step, stage, views_of_step

N, SIZE = 12, 6


def write_store(path, **changes):
    """A complete store whose every number is its row and view, so that a wrong index shows in the value."""
    meta = {
        "format": 1,
        "num_images": N,
        "num_views": 2,
        "views": ["original", "mirrored"],
        "image_size": SIZE,
        "image_channels": 3,
        "codec": {"name": "test", "moments_shape": [8, 3, 2], "dtype": "float16"},
        "encoders": {"tiny": {"name": "tiny", "dim": 5}},
        "patches": {"tiny": [4, 5]},
        "has_images": True,
        "fingerprint": "a" * 64,
        "complete": True,
    } | changes
    code = 2 * np.arange(N)[:, None] + np.arange(2)  # (N, V)
    for file, (shape, dtype) in layout(meta).items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        if file == "labels.npy":
            array = np.arange(N) % 3 - 1
        elif file == "images.npy":
            array = np.random.default_rng(0).integers(256, size=shape)
        else:
            array = np.broadcast_to(code.reshape(N, 2, *[1] * (len(shape) - 2)), shape)
        np.save(path / file, array.astype(dtype))
    (path / "files.txt").write_text("".join(f"{i:08d}\n" for i in range(N)))
    (path / "meta.json").write_text(json.dumps(meta))
    return path


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store")


def test_fetch_takes_every_part_from_the_same_row_and_view(store):
    assignment = 100 + 2 * np.arange(N)[:, None] + np.arange(2)
    data = LatentDataset(store, "tiny", torch.from_numpy(assignment.astype(np.int32)), patches="tiny", images=True)
    rows, views = np.array([7, 0, 11, 7, 3]), np.array([1, 0, 1, 0, 1])
    batch = data.fetch(rows, views)
    code = torch.from_numpy(2 * rows + views)
    images = torch.from_numpy(np.load(store / "images.npy"))
    assert (len(data), data.num_views, data.path, data.codec["name"]) == (N, 2, store, "test")
    assert torch.equal(batch["moments"], code.half().view(5, 1, 1, 1).expand(5, 8, 3, 2))
    assert torch.equal(batch["feature"], code.half().view(5, 1).expand(5, 5))
    assert torch.equal(batch["patches"], code.half().view(5, 1, 1).expand(5, 4, 5))
    assert torch.equal(batch["index"], 100 + code)
    assert batch["index"].dtype == torch.long
    assert torch.equal(batch["label"], torch.from_numpy(rows % 3 - 1))
    for image, row, view in zip(batch["image"], rows, views, strict=True):
        assert torch.equal(image, images[row].flip(-1) if view else images[row])


def test_fetch_returns_only_what_was_asked_for(store):
    data = LatentDataset(store)
    assert set(data.fetch(np.array([1]), np.array([0]))) == {"moments", "label"}
    batch = data.fetch(np.array([1]), np.array([0]))
    batch["moments"] += 1  # the tensors are copies: the store stays as it is, and so does the next fetch
    assert data.fetch(np.array([1]), np.array([0]))["moments"].unique().item() == 2


def test_a_worker_delivers_the_same_batches_and_opens_the_files_itself(store):
    data = LatentDataset(store, "tiny")
    assert len(pickle.dumps(data)) < 500
    direct = [data[address] for address in StepSampler(N, 5, 2, 3, 4, 9)]
    loader = DataLoader(
        pickle.loads(pickle.dumps(data)), sampler=StepSampler(N, 5, 2, 3, 4, 9), batch_size=None, num_workers=1
    )
    for expected, batch in zip(direct, loader, strict=True):
        assert batch["step"] == expected["step"]
        assert all(torch.equal(batch[key], expected[key]) for key in ("moments", "feature", "label"))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**32), st.integers(0, 3))
def test_every_epoch_holds_every_row_once(num_rows, batch_size, seed, first_epoch):
    steps = range(first_epoch * num_rows // batch_size, (first_epoch + 3) * num_rows // batch_size + 1)
    stream = np.concatenate([rows_of_step(num_rows, batch_size, seed, step) for step in steps])
    assert len(stream) == len(steps) * batch_size
    assert stream.dtype == np.int64
    start = first_epoch * num_rows - steps[0] * batch_size
    for epoch in stream[start : start + 3 * num_rows].reshape(3, num_rows):
        assert sorted(epoch) == list(range(num_rows))


def test_order_is_a_function_of_seed_and_epoch_alone():
    order = np.concatenate([rows_of_step(1000, 50, 0, step) for step in range(40)]).reshape(2, 1000)
    assert np.array_equal(order[1], np.concatenate([rows_of_step(1000, 250, 0, step) for step in range(4, 8)]))
    assert np.mean(order[0] == order[1]) < 0.02  # another epoch, another order
    assert np.mean(order[0] == np.concatenate([rows_of_step(1000, 50, 1, step) for step in range(20)])) < 0.02
    assert abs(np.corrcoef(order[0], order[1])[0, 1]) < 0.1


def test_the_coin_is_fair_and_its_own_stream():
    coins = np.stack([views_of_step(256, 2, 0, step) for step in range(200)])
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / coins.size**0.5
    assert np.array_equal(coins[7], views_of_step(256, 2, 0, 7))
    assert not np.array_equal(coins[7], views_of_step(256, 2, 1, 7))
    assert not views_of_step(256, 1, 0, 7).any()
    first = [dataset.generator(0, stream, 5).integers(2**63) for stream in (dataset.ROW_STREAM, dataset.VIEW_STREAM)]
    assert first[0] != first[1]


def test_the_order_is_that_of_earlier_versions():
    """A run that is continued after an update must not see rows twice."""
    assert [rows_of_step(7, 5, 3, step).tolist() for step in (1, 2)] == [[0, 4, 0, 1, 4], [3, 6, 2, 5, 2]]
    assert views_of_step(8, 2, 3, 1).tolist() == [1, 1, 1, 0, 0, 0, 1, 1]


def test_processes_share_the_global_batch_and_a_step_is_a_position():
    whole = list(StepSampler(30, 8, 2, 5, 0, 6))
    parts = [list(StepSampler(30, 8, 2, 5, 0, 6, slice(4 * rank, 4 * rank + 4))) for rank in range(2)]
    for address, *halves in zip(whole, *parts, strict=True):
        assert all(np.array_equal(address[i], np.concatenate([half[i] for half in halves])) for i in (1, 2))
    resumed = StepSampler(30, 8, 2, 5, 4, 6)
    assert len(resumed) == 2
    for address, expected in zip(resumed, whole[4:], strict=True):
        assert address[0] == expected[0]
        assert all(np.array_equal(address[i], expected[i]) for i in (1, 2))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda store: shutil.rmtree(store), "no store at"),
        (lambda store: [shutil.rmtree(store), store.mkdir()], "no store at .*encode_dataset SOURCE --out .* makes one"),
        (lambda store: (store / "meta.json").unlink(), "incomplete: run the same encode command again"),
        (lambda store: write_store(store, complete=False), "incomplete: run the same encode command again"),
        (lambda store: write_store(store, format=2), "format 2, this version reads up to 1"),
        (
            lambda store: write_store(store, encoders={"other": {"dim": 5}}),
            "no features of encoder 'tiny'; it has other",
        ),
        (lambda store: write_store(store, patches={}), "no patch tokens of encoder 'tiny'; it has none"),
        (lambda store: write_store(store, has_images=False), "encode it with --keep-images"),
        (lambda store: (store / "features/tiny.npy").unlink(), "tiny.npy is missing"),
        (lambda store: truncate(store / "latents.npy"), "latents.npy was cut short"),
        (lambda store: (store / "labels.npy").write_text("labels"), "labels.npy was cut short or is no npy file"),
        (lambda store: np.save(store / "latents.npy", np.zeros((N, 2, 8, 3, 3), np.float16)), "latents.npy holds"),
        (lambda store: np.save(store / "labels.npy", np.zeros(N, np.int32)), "labels.npy holds int32"),
    ],
)
def test_bad_stores_are_refused_by_name(store, spoil, message):
    spoil(store)
    with pytest.raises(ValueError, match=message):
        LatentDataset(store, "tiny", patches="tiny", images=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_images", "12", "num_images is '12', expected int"),
        ("num_images", True, "num_images is True, expected int"),
        ("image_size", -1, "image_size is -1, expected int"),
        ("num_views", 0, "num_views is 0, expected int"),
        ("image_channels", 0, "image_channels is 0, expected int"),
        ("encoders", [], r"encoders is \[\], expected dict"),
        ("fingerprint", None, "fingerprint is None, expected str"),
        ("views", ["original"], r"it names the views \['original'\], but num_views is 2"),
        ("codec", {"name": "x"}, "KeyError: 'moments_shape'"),
    ],
)
def test_damaged_fields_of_the_description_are_named(store, key, value, message):
    meta = json.loads((store / "meta.json").read_text())
    (store / "meta.json").write_text(json.dumps(meta | {key: value}))
    with pytest.raises(ValueError, match=rf"meta\.json: {message}"):
        LatentDataset(store)


def test_a_folder_of_images_is_told_from_a_store(tmp_path):
    (tmp_path / "0.png").touch()
    made = f"`python -m scripts.encode_dataset {tmp_path} --out data/NAME …` makes a store of the images in it"
    message = f"{tmp_path} is a folder, but no store: it has no meta.json; {made}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LatentDataset(tmp_path)


def test_an_assignment_of_another_store_is_refused(store):
    with pytest.raises(ValueError, match="build the bank from this store"):
        LatentDataset(store, assignment=np.zeros((N + 1, 2), np.int32))


def test_stage_copies_once_and_notices_changes(store, tmp_path, capsys):
    fast = tmp_path / "fast"
    copy = stage(store, fast)
    files = [path.relative_to(store) for path in store.rglob("*") if path.is_file()]
    assert copy == fast / "store"
    assert "MB/s" in capsys.readouterr().out
    assert all((copy / file).read_bytes() == (store / file).read_bytes() for file in files)
    assert torch.equal(
        LatentDataset(copy).fetch(np.arange(N), np.zeros(N, int))["moments"],
        LatentDataset(store).fetch(np.arange(N), np.zeros(N, int))["moments"],
    )

    written = (copy / "latents.npy").stat().st_mtime_ns
    assert stage(store, fast) == copy
    assert (copy / "latents.npy").stat().st_mtime_ns == written  # an identical copy is used as it is
    assert "using the copy" in capsys.readouterr().out

    truncate(copy / "latents.npy")
    stage(store, fast)
    assert (copy / "latents.npy").read_bytes() == (store / "latents.npy").read_bytes()

    for dim in (7, 8):  # the second change leaves meta.json as long as it was
        write_store(store, encoders={"tiny": {"dim": 5}, "added": {"dim": 7, "antialias": dim}})
        stage(store, fast)
        assert LatentDataset(copy).meta["encoders"]["added"]["antialias"] == dim
    assert LatentDataset(copy, "added").fetch(np.arange(3), np.zeros(3, int))["feature"].shape == (3, 7)

    write_store(store, fingerprint="b" * 64)
    with pytest.raises(ValueError, match="holds another store"):
        stage(store, fast)


def test_stage_takes_the_name_of_the_folder_that_it_is_called_in(store, tmp_path, monkeypatch):
    monkeypatch.chdir(store)
    assert stage(".", tmp_path / "fast") == tmp_path / "fast" / "store"


def test_stage_waits_for_another_process_that_copies(store, tmp_path):
    (tmp_path / "fast" / "store").mkdir(parents=True)
    copying = threading.Thread(target=stage, args=(store, tmp_path / "fast"))
    with open(tmp_path / "fast" / "store" / ".staging", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copying.start()
        copying.join(0.3)
        assert copying.is_alive()
        assert [path.name for path in (tmp_path / "fast" / "store").iterdir()] == [".staging"]
    copying.join()
    assert len(LatentDataset(tmp_path / "fast" / "store")) == N


def test_held_out_images_lie_beside_the_store_and_not_beside_a_link_to_it(tmp_path, monkeypatch):
    (tmp_path / "disk/big").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/big")
    monkeypatch.chdir(tmp_path / "disk/big")
    for store in (tmp_path / "link", "../../link", "."):
        assert holdout_path(store) == tmp_path / "disk/big-holdout"


def test_stage_checks_the_disk_first_and_leaves_no_meta_behind(store, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000))
    with pytest.raises(ValueError, match="make room or choose another directory"):
        stage(store, tmp_path / "fast")
    assert not (tmp_path / "fast/store/meta.json").exists()
    with pytest.raises(ValueError, match="no store at"):
        LatentDataset(tmp_path / "fast/store")
