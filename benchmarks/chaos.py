"""Kill every command at random moments, run it again, and compare with a run that nobody disturbed.

    python -m benchmarks.chaos --kills 20 --work DIR --out FILE

For encode, bank, train, sample and evaluate, each with 1 and 2 processes on the CPU: one undisturbed run, then runs
that get SIGKILL (or `--signal TERM`) at a random moment and are started again by the same command until the asked
number of kills is reached. After each kill every file under its final name must be whole: equal to the file of that
name of the undisturbed run, or of a kind that says of itself that it is unfinished. At the end all files must be there
and equal: latents, features, bank, weights, optimiser, logs, PNGs, npz, metrics. What says when, where and how fast is
left out of the comparison, nothing else. Exit status 0 only if everything held.

A command is a process forked from this one, which has the libraries loaded: a kill then hits its work and not the
seconds in which Python imports. Intervals at which work is noted and grids of samples are shortened, so that kills find
something to go on from.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import sample_ddp
import train
from evaluations import evaluator
from memory import build_bank
from memory.files import write_json
from memory.provenance import provenance
from scripts import encode_dataset, make_assets

ROOT = Path(__file__).resolve().parents[1]
ENCODER = "efficientnet-lite0@32"
PLACE_AND_TIME = {"time", "seconds", "images_per_second", "run", "runs", "made"}
PATIENCE = 300  # seconds until a command counts as hanging
ROLLING = re.compile(r"checkpoints/\d+\.pt$")
MISSES = 40  # rounds in a row that end before their kill


def copy_images(work: Path, count: int) -> None:
    """The first images of Fashion-MNIST, for the stages to work on."""
    words = ["--source", str(ROOT / "assets" / "fashion-mnist"), "--out", str(work / "images")]
    make_assets.main(["images", *words, "--train", str(count), "--test", "1"])


def load_libraries() -> None:
    """Import what the commands import late; forks would spend most of a short stage on it."""
    from diffusers import AutoencoderKL  # noqa: F401


def commands(work: Path) -> dict[str, tuple[Callable, list[str]]]:
    """The stages of the path at small size: a command's `main` and its arguments; each writes into work/out."""
    images, store, bank = work / "images", work / "encode" / "store", work / "bank" / "bank"
    run, samples = work / "train" / "run", work / "sample" / "samples"
    encode = [images, "--out", work / "out" / "store", "--codec", ROOT / "assets" / "fashion-mnist-vae"]
    encode += ["--encoder", ENCODER, "--image-size", 32, "--views", 2, "--holdout", 0.1, "--keep-images"]
    build = ["--store", store, "--encoder", ENCODER, "--out", work / "out" / "bank", "--k", 100, "--passes", 20]
    training = ["--store", store, "--bank", bank, "--out", work / "out" / "run", "--model", "SiT-Ti/2"]
    training += ["--steps", 24, "--batch-size", 16, "--log-every", 2, "--save-every", 4, "--snapshot-every", 8]
    training += ["--eval-every", 12, "--sample-every", 24, "--workers", 1]
    sampling = ["--checkpoint", run, "--out", work / "out" / "samples", "--num-images", 48, "--steps", 4]
    sampling += ["--sampler", "euler", "--batch-size", 4]
    score = [store, samples / "samples.npz", "--encoder", ENCODER, "--num-samples", 48]
    score += ["--out", work / "out" / "metrics.json"]
    stages = {
        "encode": (encode_dataset.main, [*encode, "--batch-size", 16, "--workers", 1]),
        "bank": (build_bank.main, build),
        "train": (train.main, training),
        "sample": (sample_ddp.main, sampling),
        "evaluate": (evaluator.main, score),
    }
    return {name: (main, [str(word) for word in words]) for name, (main, words) in stages.items()}


class Job:
    """A command on several forked processes, each in a session of its own, so that its workers die with it."""

    def __init__(self, main: Callable, words: list[str], processes: int, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.began = time.monotonic()
        self.pids = [self._fork(main, words, rank, processes, port, log) for rank in range(processes)]

    @staticmethod
    def _fork(main: Callable, words: list[str], rank: int, processes: int, port: int, log: Path) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(output, stream)
            # pytest has put streams of its own in their places
            sys.stdout, sys.stderr = (os.fdopen(stream, "w", 1, closefd=False) for stream in (1, 2))
            if processes > 1:
                launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({key: str(value) for key, value in launcher.items()})
            encode_dataset.SAVE_SECONDS, train.GRID_STEPS = 0.05, 1
            main(words)
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait(self, until: float) -> list[int] | None:
        """Exit statuses if all processes end before the moment `until`, else None."""
        statuses = []
        for pid in self.pids:
            while True:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses.append(os.waitstatus_to_exitcode(status))
                    break
                if time.monotonic() > until:
                    self.pids = self.pids[len(statuses) :]
                    return None
                time.sleep(0.002)
        self.pids = []
        return statuses

    def kill(self, number: int) -> None:
        """Send a signal to every process that is left and to its workers, and wait for their end."""
        for pid in self.pids:
            try:
                os.killpg(pid, number)
            except ProcessLookupError:  # it has not reached setsid yet
                os.kill(pid, number)
        if self.wait(time.monotonic() + PATIENCE) is None:
            for pid in self.pids:
                os.killpg(pid, signal.SIGKILL)
            raise AssertionError(f"still there {PATIENCE} s after signal {number}")


def comparable(value: object) -> object:
    """A value read from a file without what says when, where and how fast; tensors by their bits."""
    if isinstance(value, dict):
        return {key: comparable(part) for key, part in value.items() if key not in PLACE_AND_TIME}
    if isinstance(value, list | tuple):
        return [comparable(part) for part in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), list(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    return value


def content(path: Path) -> object:
    """What must be equal of a file; raises if it cannot be read as what its name says."""
    if path.suffix == ".json":
        return comparable(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [comparable(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix in (".pt", ".pth", ".freq", ".assign"):
        return comparable(torch.load(path, weights_only=True))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(folder: Path) -> dict[str, Path]:
    """Files below a folder by their relative names."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def written(work: Path) -> dict[str, Path]:
    """A stage's files by name: those of its folder, and the features that an evaluation keeps beside its reference."""
    beside = [path for path in (work / "encode").glob("*") if path.is_file()]
    return files_of(work / "out") | {f"beside/{path.name}": path for path in beside}


def clear(work: Path) -> None:
    """Remove what a stage has written."""
    shutil.rmtree(work / "out", ignore_errors=True)
    for path in written(work).values():
        path.unlink()


def unfinished_by_contract(path: Path) -> bool:
    """Whether a file with a final name may be incomplete: arrays of a store without meta.json, a run's growing log, a
    samples.json that says so."""
    if path.name == "log.jsonl":
        return True
    if path.name == "samples.json":
        return not json.loads(path.read_text())["complete"]
    store = next((folder for folder in path.parents if folder.name.startswith("store")), None)
    return store is not None and not (store / "meta.json").exists()


def damaged(files: dict[str, Path], reference: dict[str, object]) -> list[str]:
    """Files with final names that a kill has left partial, or other than the undisturbed run's."""
    found = []
    for name, path in files.items():
        if path.name.startswith(".") or "progress" in path.parts or unfinished_by_contract(path):
            continue
        try:
            same = content(path) == reference.get(name, content(path))  # rolling checkpoints are gone at the end
        except Exception as error:  # whatever reading says, the file is partial
            found.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if not same:
            found.append(f"{name} differs")
    return found


def differences(found: dict[str, Path], reference: dict[str, object], rolling: bool = True) -> list[str]:
    """In what a finished run's files differ from those of the undisturbed run.

    Without `rolling`, full states before the last one are left out: a signal saves one at the step it meets.
    """
    last = max((name for name in reference if ROLLING.search(name)), default=None)
    if not rolling:
        found = {name: path for name, path in found.items() if name == last or not ROLLING.search(name)}
        reference = {name: value for name, value in reference.items() if name == last or not ROLLING.search(name)}
    problems = [f"missing at the end: {name}" for name in sorted(reference.keys() - found.keys())]
    problems += [f"left at the end: {name}" for name in sorted(found.keys() - reference.keys())]
    return problems + [
        f"different at the end: {name}"
        for name, path in found.items()
        if name in reference and content(path) != reference[name]
    ]


def undisturbed(work: Path, stage: str, processes: int) -> tuple[dict[str, object], float]:
    """What a stage writes when nothing happens, and the seconds that it takes; the next stages read it."""
    main, words = commands(work)[stage]
    log = work / f"{stage}-{processes}.log"
    clear(work)
    job = Job(main, words, processes, log)
    statuses = job.wait(time.monotonic() + PATIENCE)
    seconds = time.monotonic() - job.began
    if statuses is None or any(statuses):
        raise RuntimeError(f"the undisturbed run of {stage} failed with {statuses}: see {log}")
    reference = {name: content(path) for name, path in written(work).items()}
    if processes == 1:
        shutil.rmtree(work / stage, ignore_errors=True)
        shutil.copytree(work / "out", work / stage)
    return reference, seconds


def starve(work: Path, stage: str, faults: int, draw: random.Random) -> dict:
    """Run a stage on a disk that is too small, again and again a larger one, and say what did not hold.

    Needs the right to mount a tmpfs.
    """
    main, words = commands(work)[stage]
    out, log = work / "out", work / f"{stage}-full.log"
    reference, seconds = undisturbed(work, stage, 1)
    needed = sum(4096 * -(-path.stat().st_size // 4096) for path in files_of(out).values())
    clear(work)
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", out], check=True)
    problems, met = [], 0
    try:
        for size in sorted(draw.randrange(needed) for _ in range(faults)):
            size = max(size, sum(path.stat().st_blocks * 512 for path in out.rglob("*"))) + 4096
            subprocess.run(["mount", "-o", f"remount,size={size}", out], check=True)
            log.unlink(missing_ok=True)
            job = Job(main, words, 1, log)
            statuses = job.wait(time.monotonic() + PATIENCE)
            if statuses is None:
                job.kill(signal.SIGKILL)
                problems.append(f"hangs on a disk of {size:,} bytes")
            elif any(statuses):
                met += 1
                lines = log.read_text().strip().splitlines()
                if not any(word in lines[-1] for word in ("disk", "space", "free", "reserve")):
                    problems.append(f"on a disk of {size:,} bytes it says: {lines[-1][:300]}")
            problems += [f"on a disk of {size:,} bytes: {problem}" for problem in damaged(written(work), reference)]
        subprocess.run(["mount", "-o", f"remount,size={10 * needed + (1 << 24)}", out], check=True)
        statuses = Job(main, words, 1, log).wait(time.monotonic() + PATIENCE)
        if statuses != [0]:
            problems.append(f"fails with {statuses} when there is room again: see {log}")
        else:
            problems += differences(written(work), reference)
    finally:
        subprocess.run(["umount", "--lazy", out], check=True)
        out.rmdir()
    return {"stage": stage, "processes": 1, "seconds_undisturbed": seconds, "full_disks": met, "problems": problems}


def endure(work: Path, stage: str, processes: int, kills: int, number: int, draw: random.Random) -> dict:
    """Kill a stage `kills` times, and say what did not hold."""
    main, words = commands(work)[stage]
    log = work / f"{stage}-{processes}.log"
    reference, seconds = undisturbed(work, stage, processes)
    problems, done, misses, rounds, continued = [], 0, 0, 0, 0
    clear(work)
    while True:
        job, rounds = Job(main, words, processes, log), rounds + 1
        moment = job.began + draw.uniform(0, seconds) if done < kills else job.began + PATIENCE
        statuses = job.wait(moment)
        if statuses is None and done < kills:
            job.kill(number)
            done, misses = done + 1, 0
            continued += any(path.name.startswith(".") or "progress" in path.parts for path in written(work).values())
            problems += [f"after kill {done}: {problem}" for problem in damaged(written(work), reference)]
            continue
        if statuses is None:
            job.kill(signal.SIGKILL)
            problems.append("the last run hangs")
            break
        if any(statuses):
            problems.append(f"after kill {done} the command fails with {statuses}: see {log}")
            break
        problems += differences(written(work), reference, rolling=number == signal.SIGKILL)
        misses += 1
        if done >= kills or problems or misses > MISSES:
            break
        clear(work)
    if done < kills and not problems:
        problems.append(f"only {done} kills found the command running")
    clear(work)
    facts = {"stage": stage, "processes": processes, "seconds_undisturbed": round(seconds, 2), "kills": done}
    return facts | {"runs": rounds, "kills_with_work_half_done": continued, "problems": problems}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill every command at random moments and compare the results.")
    parser.add_argument("--kills", type=int, default=20, help="kills of each stage with each number of processes")
    parser.add_argument("--stages", nargs="+", default=list(commands(Path())), help="which; each needs those before it")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="1 must come first")
    parser.add_argument("--signal", default="KILL", choices=("KILL", "TERM", "INT"), help="what is sent")
    parser.add_argument("--full-disks", type=int, default=0, help="instead run each stage on so many disks too small")
    parser.add_argument("--images", type=int, default=400, help="images of Fashion-MNIST to work on")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, required=True, help="folder for what the commands write")
    parser.add_argument("--out", type=Path, help="JSON file of the outcome")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    load_libraries()
    work, draw = args.work.resolve(), random.Random(args.seed)
    work.mkdir(parents=True, exist_ok=True)
    copy_images(work, args.images)
    outcomes = []
    for stage in args.stages if args.full_disks else ():
        outcomes.append(starve(work, stage, args.full_disks, draw))
        facts = outcomes[-1]
        print(f"{stage:9} {facts['full_disks']} full disks, {len(facts['problems'])} problems", flush=True)
        print(*facts["problems"][:10], sep="\n    ", flush=True)
    for stage in () if args.full_disks else args.stages:
        for processes in args.processes:
            number = getattr(signal, f"SIG{args.signal}")
            outcomes.append(endure(work, stage, processes, args.kills, number, draw))
            facts = outcomes[-1]
            print(
                f"{stage:9} {processes} processes: {facts['kills']} kills in {facts['runs']} runs of "
                f"{facts['seconds_undisturbed']} s, {len(facts['problems'])} problems",
                *facts["problems"][:10],
                sep="\n    ",
                flush=True,
            )
    if args.out:
        write_json(args.out, {"signal": args.signal, "outcomes": outcomes, "provenance": provenance(argv)})
    if any(facts["problems"] for facts in outcomes):
        sys.exit("not everything held")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
