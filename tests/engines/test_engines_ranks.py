"""Several processes and one engine: each asks for its own prompts, the first sends the weights."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from fake_vllm import serving

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("ranks_program.py")
WORDS = ("abc", "d", "ef", "ghij", "kl", "mno", "p", "qrs", "tu", "v", "wx", "y", "za", "bd", "ce", "fg")


@pytest.fixture
def home(tmp_path, make_lm, toy_tokenizer):
    make_lm("llama").save_pretrained(tmp_path / "model")
    toy_tokenizer.save_pretrained(tmp_path / "model")
    rows = [json.dumps({"prompt": " ".join(word)}) for word in WORDS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def program(home, forking_python):
    """Runs of the program: devices, strategy, engine, and the server's URL."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [forking_python, str(PROGRAM), str(home), *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)

    return run


@pytest.fixture
def outcome(home, program):
    def run(devices: int, strategy: str, kind: str, *rest: str) -> dict:
        result = program(devices, strategy, kind, *rest)
        assert result.returncode == 0, result.stderr[-3000:]
        return torch.load(home / f"out-{kind}-{devices}.pt", weights_only=True)

    return run


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_share_one_server(outcome, make_lm, strategy):
    with serving(make_lm("llama")) as fake:
        found = outcome(2, strategy, "server", fake.url)
        assert torch.equal(*found["weights"])
        labels = [body["new_version"] for body in fake.bodies("/update_weight_version")]
        assert [label.partition("-")[0] for label in labels] == [str(n) for n in range(8)]  # once each, not by both
        asked = [body for body in fake.bodies() if "n" in body["sampling_params"]]
        assert len(asked) == 2 * len(WORDS)  # every prompt, once an epoch
        assert len({tuple(body["token_ids"]) for body in asked}) == len(WORDS)
        assert all(step["policy/kl_sampler"] < 1e-6 for step in found["steps"])
        assert not list(Path("/dev/shm").glob(f"lightning_rlhf-*/{labels[-1]}"))


def test_server_that_fails_one_process_ends_both(program, make_lm):
    with serving(make_lm("llama")) as fake:
        unanswered: list[list[int]] = []

        def fault(path: str, body: dict) -> object:
            if not fake.version.startswith("2-") or "n" not in body.get("sampling_params", {}):
                return None
            unanswered.append(body["token_ids"])
            return 500 if body["token_ids"] == unanswered[0] else None  # a prompt of one of them

        fake.fault = fault
        result = program(2, "ddp", "server", fake.url)
        assert result.returncode != 0
        assert "failed at /inference/v1/generate" in result.stderr
        assert "another process of the run failed" in result.stderr


def test_rollouts_ahead_of_two_processes_are_those_of_one(outcome):
    one = outcome(1, "auto", "ahead")
    two = outcome(2, "ddp", "ahead")
    assert torch.equal(*two["weights"])
    assert float((one["weights"][0] - two["weights"][0]).abs().max()) < 1e-5
    resumed = outcome(1, "auto", "resumed")  # on one process, from the checkpoint of two
    assert float((resumed["weights"][0] - two["weights"][0]).abs().max()) < 1e-5
    assert len(resumed["steps"]) == len(two["steps"]) - 3
