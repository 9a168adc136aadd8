"""The benchmark of training runs on a CPU: it times train.py's own steps, after a comparison with float32."""

import gc
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_train
from benchmarks.path import make_encoder
from memory.resident import ResidentDataset
from models.encoder import load_encoder
from models.sit import SiT


def test_it_writes_what_it_measured(tmp_path, capsys):
    out = tmp_path / "train.json"
    words = [
        "--model",
        "SiT-Ti/2",
        "--batches",
        2,
        "--steps",
        1,
        "--images",
        64,
        "--reference",
        "--profile",
        "--resident",
        "--out",
        out,
    ]
    bench_train.main(list(map(str, words)))
    result = json.loads(out.read_text())
    assert [row["what"] for row in result["rows"]] == ["train.py", "train.py resident", "peers' recipe"]
    assert all(row["images_per_second"] > 0 for row in result["rows"])
    assert result["errors against float32"]["gradients, train.py"] < 1e-5
    assert result["ceiling_tflops"] > 0
    assert result["operations_an_image"] == 3 * 2 * counted_macs()
    assert {"code", "device", "processes", "versions", "command", "date"} <= result.keys()
    assert "images_per_second" in capsys.readouterr().out


def test_aligned_steps_begin_with_no_other_network_in_memory(tmp_path, monkeypatch):
    """Whose weights and gradients their peak would count."""
    left = []

    def aligned(args, folder):
        left.extend(thing for thing in gc.get_objects() if isinstance(thing, SiT))
        return iter(())

    monkeypatch.setattr(bench_train, "aligned", aligned)
    before = [thing for thing in gc.get_objects() if isinstance(thing, SiT)]
    words = ["--model", "SiT-Ti/4", "--batches", "1", "--steps", "1", "--images", "8", "--align", "test_vit@128"]
    bench_train.main([*words, "--out", str(tmp_path / "out.json")])
    left = [network for network in left if not any(network is other for other in before)]
    assert len(left) == 1  # the plain one, which the peers' recipe trains
    assert all(parameter.grad is None for parameter in left[0].parameters())


def test_aligned_steps_run_the_encoder_and_count_it(tmp_path):
    """test_vit at 128 px gives 8×8 tokens of 64 numbers, as many as SiT-Ti/4 has of width 192."""
    out = tmp_path / "train.json"
    words = ["--model", "SiT-Ti/4", "--batches", "2", "3", "--steps", "1", "--images", "8", "--align", "test_vit@128"]
    bench_train.main([*words, "--out", str(out), "--train-args", "--model-options", "align_depth=3"])
    result = json.loads(out.read_text())
    ways = [(row["what"], row["batch"]) for row in result["rows"]]
    assert ways == [("train.py", 2), ("train.py", 3), ("train.py aligned", 2), ("train.py aligned", 3)]
    assert all(row["images_per_second"] > 0 for row in result["rows"])
    more = result["operations_an_image_aligned"] - result["operations_an_image"]
    hidden, tokens = 2048, 64
    head = 3 * 2 * tokens * (192 * hidden + hidden * hidden + hidden * 64)
    encoder = load_encoder("test_vit@128", weights=saved_encoder(tmp_path)).model
    weights = sum(module.weight.numel() for module in encoder.modules() if isinstance(module, torch.nn.Linear))
    assert head < more < head + 2 * 65 * weights * 2  # with the encoder's patches and its attention
    assert more > head + 2 * 65 * weights * 0.99


def saved_encoder(folder):
    make_encoder(folder / "weights.safetensors", "test_vit")
    return folder / "weights.safetensors"


def test_resident_steps_read_the_same_batch_from_the_device(tmp_path):
    bench_train.make_data(tmp_path, images=4, image_size=64)
    trainer = bench_train.make_trainer(tmp_path, "SiT-Ti/2", 2, [])
    read, data = next(trainer.batches()), trainer.data
    with bench_train.resident(trainer):
        assert trainer.args.resident
        assert isinstance(trainer.data.train, ResidentDataset)
        held = next(trainer.batches())
        assert {key: torch.as_tensor(value).tolist() for key, value in held.items()} == {
            key: torch.as_tensor(value).tolist() for key, value in read.items()
        }
    assert trainer.data is data
    assert not trainer.args.resident


def test_two_processes_exchange_gradients_in_the_ways_that_are_named(root, environment, tmp_path):
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["--model", "SiT-Ti/4", "--batches", "1", "--steps", "1", "--images", "64", "--exchange", "25", "25:bf16"]
    command = [*torchrun, "-m", "benchmarks.bench_train", *words, "--out", str(tmp_path / "out.json")]
    subprocess.run(command, cwd=root, env=environment, check=True, timeout=200)
    result = json.loads((tmp_path / "out.json").read_text())
    way = "buckets of 25 MB, NCCL chooses its blocks"
    assert [row["what"] for row in result["rows"]] == ["one process alone", "train.py", way, f"{way}, rounded to bf16"]
    assert all(row["share_of_linear"] > 0 for row in result["rows"][1:])
    assert all(len(row["seconds_of_each"]) == 2 for row in result["rows"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--memory", "no GPU"),
        ("--memory --resident", "leave one"),
        ("--memory --align", "--align: it times no"),
        ("--memory --exchange 25", "--exchange: it times no"),
        ("--exchange 25:8", "25:8: there is one process"),
    ],
)
def test_what_cannot_be_measured_here_is_said_at_once(words, message):
    with pytest.raises(ValueError, match=message):
        bench_train.main([*words.split(), "--out", "x.json"])


def counted_macs():
    """Products of SiT-Ti/2 on a 4×32×32 latent: 6 blocks of width 192, 256 tokens, patches of 2×2×4 numbers."""
    width, tokens, patch = 192, 256, 16
    block = tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2
    ends = 2 * tokens * patch * width + 2 * width**2 + 256 * width + width**2 + 768 * width
    return 6 * block + ends


def test_rounded_gradients_are_exchanged_by_the_ways_own_group(monkeypatch):
    groups, hooks = [], []

    class Wrapped:
        def __init__(self, network, process_group, **options):
            assert process_group is groups[-1]

        def register_comm_hook(self, group, hook):
            hooks.append((group, hook))

    monkeypatch.setattr(bench_train, "DistributedDataParallel", Wrapped)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **given: groups.append(object()) or groups[-1])
    list(bench_train.exchanges(SimpleNamespace(network=None), ["25", "25:bf16"]))
    assert hooks == [(groups[1], bench_train.bf16_compress_hook)]


@pytest.mark.parametrize("words", ["25:fp16", "bf16", "25:bf16:8", "25:8:4:2", "x"])
def test_a_way_to_exchange_that_cannot_be_read_is_refused_at_once(words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"--exchange {words}: expected MB"):
        bench_train.main(["--exchange", words, "--out", "x.json"])
