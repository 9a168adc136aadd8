"""What the READMEs print is true: their commands parse, the example runs, files and links exist."""

import argparse
import importlib
import os
import re
import shlex
import subprocess

import pytest
import torch

from memory.bank import MemoryBank
from scripts.quoted import QUOTED

COMMANDS = {"train.py": "train", "sample_ddp.py": "sample_ddp"}
PAGES = ("README.md", "benchmarks/README.md", "evaluations/README.md")


def blocks(root, language, pages=PAGES):
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
    return [block for page in pages for kind, block in fence.findall((root / page).read_text()) if kind == language]


def commands(root, page):
    """(module, words) of every command line of ours in the bash blocks, continuation lines joined."""
    for block in blocks(root, "bash", [page]):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words):
                if word in COMMANDS:
                    yield COMMANDS[word], words[place + 1 :]
                elif word == "-m" and words[place + 1].split(".")[0] in (
                    "scripts",
                    "memory",
                    "evaluations",
                    "benchmarks",
                ):
                    yield words[place + 1], words[place + 2 :]


class Parsed(Exception):
    """Raised in the place of what a command does after it has read its arguments."""


@pytest.mark.parametrize(("page", "least"), zip(PAGES, (10, 30, 5), strict=True))
def test_every_command_parses(root, page, least, monkeypatch):
    found = list(commands(root, page))
    assert len(found) >= least
    if page == "README.md":
        modules = {"scripts.encode_dataset", "memory.build_bank", "train", "sample_ddp", "evaluations.evaluator"}
        assert {module for module, _ in found} >= modules
    read = argparse.ArgumentParser.parse_args

    def only(parser, words):
        read(parser, words)
        raise Parsed

    for module, words in found:
        module = importlib.import_module(module)
        if hasattr(module, "parse"):
            module.parse(words)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(argparse.ArgumentParser, "parse_args", only)
                with pytest.raises(Parsed):
                    module.main(words)


def test_every_command_is_a_program(root):
    """A module with a `main` runs it when it is started; without that it would do nothing, and succeed."""
    files = [
        path
        for folder in (".", "scripts", "memory", "evaluations", "benchmarks")
        for path in root.glob(f"{folder}/*.py")
    ]
    with_main = [path for path in files if re.search(r"^def main\(", path.read_text(), re.M)]
    assert {"train.py", "export.py", "build_bank.py", "evaluator.py"} <= {path.name for path in with_main}
    for path in with_main:
        assert re.search(r'\n\nif __name__ == "__main__":\n(    .*\n)*?    (.*\()?main[()]', path.read_text()), path


def test_the_tree_names_files_that_exist(root):
    (tree,) = [block for block in blocks(root, "", ["README.md"]) if block.startswith("train.py")]
    for line in tree.splitlines():
        assert (root / line.split()[0]).exists(), line


def test_links_lead_somewhere(root):
    """Relative ones to a file, and behind a # to a heading of it, as GitHub names them."""

    def prose(path):
        return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)

    def headings(path):
        lines = re.findall(r"^#+ (.*)$", prose(path), re.M)
        return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}

    pages = [page for folder in ("assets", "benchmarks", "evaluations") for page in (root / folder).rglob("*.md")]
    found = 0
    for page in [root / "README.md", *pages]:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if not link.startswith(("https:", "http:")):
                name, _, heading = link.partition("#")
                path = page.parent / name if name else page
                assert path.exists(), f"{page}: {link}"
                assert not heading or heading in headings(path), f"{page}: {link}"
                found += 1
    assert found > 60


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(root, page):
    text = (root / page).read_text()
    for name in re.findall(r"`((?:scripts|models|memory|evaluations|benchmarks|tests|assets)/[\w./*-]+)`", text):
        assert list(root.glob(name)), name
    for module in re.findall(r"`(?:python -m )?((?:scripts|memory|evaluations|benchmarks)\.[a-z_]+)(?= |`)", text):
        assert (root / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_every_recipe_is_printed(root):
    text = (root / "README.md").read_text()
    for script in (root / "scripts").glob("*.sh"):
        assert script.name in text or not os.access(script, os.X_OK) or script.name == "setup.sh", script.name
    for script in re.findall(r"scripts/[\w-]+\.sh", "".join((root / page).read_text() for page in PAGES)):
        assert (root / script).is_file(), script


def test_shell_blocks_are_shell(root):
    for block in blocks(root, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_variables_before_a_script_are_read(root):
    """By it, or by what it sources or hands over to."""
    scripts = {script.name: script.read_text() for script in (root / "scripts").glob("*.sh")}
    text = "".join((root / page).read_text() for page in PAGES)
    found = re.findall(r"((?:\b[A-Z_]+=\S+ )+)bash scripts/([\w-]+\.sh)", text)
    assert len(found) > 5
    for given, script in found:
        used, left = [], [script]
        while left:
            used.append(left.pop())
            code = re.sub(r"^#.*$", "", scripts[used[-1]], flags=re.M)
            left += [name for name in scripts if name in code and name not in used]
        for name in re.findall(r"([A-Z_]+)=", given):
            assert any(re.search(rf"\$\{{{name}:", scripts[one]) for one in used), f"{script} does not read {name}"


def test_published_figures_are_the_quoted_ones(root):
    """Where the README prints a figure beside a command, it is that of the table of all figures."""
    quoted = {row.re_evaluate: row.metrics["FID"] for row in QUOTED if row.sampler == "SDE"}
    (block,) = [block for block in blocks(root, "bash") if "published: FID" in block]
    printed = dict(re.findall(r"^(.*\S) +# published: FID ([\d.]+)$", block, re.M))
    assert len(printed) == 5
    assert {command: float(fid) for command, fid in printed.items()} == {name: quoted[name] for name in printed}
    (row,) = re.findall(r"^\| `bash scripts/train-gmem-xl.sh`.*$", (root / "README.md").read_text(), re.M)
    trained = {row.training_steps: row.metrics["FID"] for row in QUOTED if row.method == "GMem"}
    found = re.findall(r"([\d.]+) at ([\d,]+)", row)
    assert {int(steps.replace(",", "")): float(fid) for fid, steps in found} == trained


def test_the_memory_example_runs(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    MemoryBank(torch.randn(20, 6), list(range(20)), meta={"encoder": "toy"}).save("demo/banks/fashion/bank.pth")
    (example,) = blocks(root, "python")
    exec(example, {})
    mixed = MemoryBank.load("demo/banks/mixed")
    assert len(mixed) == 20
    assert mixed.freq.max() == 10
    assert mixed.meta["encoder"] == "toy"
    before = MemoryBank.load("demo/banks/fashion")
    torch.testing.assert_close(mixed[3], torch.nn.functional.normalize(before[3] + before[2], dim=0))


@pytest.mark.parametrize("script", ["demo.sh", "test.sh"])
def test_the_two_commands_are_printed(root, script):
    assert f"bash scripts/{script}" in blocks(root, "bash")[0]


def test_every_large_file_has_its_reason(root):
    licence = (root / "README.md").read_text().partition("## Licence")[2]
    large = [path for folder in ("assets", "benchmarks") for path in (root / folder).rglob("*") if path.is_file()]
    large = [path for path in large if path.stat().st_size > 2**21]
    assert large
    for path in large:
        assert f"{path.relative_to(root)}`" in licence or f"`{path.parent.name}`" in licence, path
