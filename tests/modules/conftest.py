"""Models and data for programs of several processes, and what comes out of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

PROMPTS = ["a b", "c", "d e f", "g", "h i", "j k l m", "n", "o p", "q r s", "t", "u"]  # 11: an odd number to evaluate
ENDS = list(range(10))


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory, make_lm, make_scorer, make_tokenizer) -> Path:
    """Models, of two layers or the file's LAYERS, and data."""
    folder = tmp_path_factory.mktemp("ddp")
    depth = {"n_layer": getattr(request.module, "LAYERS", 2)}
    networks = {"lm": make_lm(end=ENDS, **depth), "other": make_lm(end=ENDS, seed=5, **depth)}
    for name, network in (networks | {"scorer": make_scorer(**depth)}).items():
        network.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    files = {
        "prompts": [{"prompt": p} for p in PROMPTS],
        "texts": [{"text": p + " x y z"} for p in PROMPTS] * 3,
        "demonstrations": [{"prompt": p, "response": (p[::-1] + " v") * (1 + i % 2)} for i, p in enumerate(PROMPTS)],
        "comparisons": [
            {"prompt": p, "responses": ["v", "w x", "y", "z z z"][: 2 + i % 3], "ranks": [0, 1, 1, 2][: 2 + i % 3]}
            | {"systems": [f"{p[0]} even" if i % 2 == 0 else "odd", "all", "all", "last"][: 2 + i % 3]}
            for i, p in enumerate(PROMPTS)
        ],
    }
    files |= {f"one_{name[:-1]}": rows[:1] for name, rows in files.items()}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def outcome(request, folder) -> Callable[[str, str], dict]:
    """What came out of the first process, by name of the run and strategy, of the file's JOBS under its HOST.

    A file that is to see the machine's GPUs says so by VISIBLE, and how many hosts share its jobs by ABREAST.
    """
    module = request.module
    python = sys.executable if getattr(module, "VISIBLE", False) else request.getfixturevalue("forking_python")
    host = Path(__file__).with_name(getattr(module, "HOST", "ddp_host.py"))
    inherited = {key: value for key, value in os.environ.items() if key not in ("MASTER_PORT", "LOCAL_RANK")}
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet |= {} if getattr(module, "VISIBLE", False) else {"CUDA_VISIBLE_DEVICES": ""}
    options = {"env": inherited | quiet, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    abreast = getattr(module, "ABREAST", 1)
    shares = [module.JOBS[i::abreast] for i in range(abreast)]
    hosts = [subprocess.Popen([python, str(host), str(folder), *share], **options) for share in shares]
    for done in hosts:
        _, errors = done.communicate(timeout=400)
        assert done.returncode == 0, errors[-4000:]

    def of(name: str, strategy: str) -> dict:
        statuses = json.loads((folder / f"{strategy}.json").read_text())["statuses"]
        for rank, status in enumerate(statuses):
            log = (folder / f"{strategy}-{rank}.log").read_text()[-4000:]
            assert status is not None, f"hangs: {log}"
            assert status == 0, log
        return torch.load(folder / f"{name}-{strategy}.pt", map_location="cpu")

    return of
