"""Stands for `python` in a recipe: holds every command of this project to so much GPU memory, and notes its peak.

    python benchmarks/limited.py GIB NOTES train.py --store …

NOTES gets a JSON line when a command ends, however it ends. Other words go to plain Python; pip is not called, so that
a recipe finds what is installed.
"""

import json
import os
import runpy
import sys
import time

PACKAGES = ("scripts", "memory", "evaluations")


def main() -> None:
    gib, notes, *words = sys.argv[1:]
    module = words[0] == "-m" and words[1].split(".")[0] in PACKAGES
    if words[:2] == ["-m", "pip"]:
        return
    if not (module or words[0].endswith(".py")):
        os.execv(sys.executable, [sys.executable, *words])
    import torch  # here, because plain Python does without

    sys.path[0], sys.argv, begin = os.getcwd(), words[1:] if module else words, time.perf_counter()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # or every process would limit the first GPU
        limit = float(gib) * 2**30 / torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit))
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        note = {"command": " ".join(word for word in words[: 1 + module] if word != "-m")}
        note["seconds"] = round(time.perf_counter() - begin, 1)
        if cuda:
            note["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            note["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        with open(notes, "a") as file:
            file.write(json.dumps(note) + "\n")


if __name__ == "__main__":
    main()
