"""A run's own server: the first process starts it, the others are told, and nothing is left of a failed start."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_rlhf.engines import EngineError, LocalServer
from lightning_rlhf.engines.vllm import run_server
from lightning_rlhf.models import ModelSource, PolicyModel

URL = "http://127.0.0.1:8123"


class OfTwo:
    """One of two processes; the other says `other` of its machine, and the first says the address."""

    def __init__(self, rank: int, folder: Path, *, other: str = "") -> None:
        self.rank, self.folder, self.other = rank, folder, other or socket.gethostname()

    def agree(self, problem: Exception | None) -> None:
        if problem is not None:
            raise problem

    def gather_text(self, text: str) -> str:
        return f"{text}{self.other} " if text.endswith(" ") else text or URL


class Fake:
    """Stands for `ServerProcess`; `problem` is raised by its start."""

    problem: Exception | None = None
    built: list[tuple[Any, ...]] = []
    url = URL

    def __init__(self, policy: str, server: LocalServer, *, log: Path, work: Path) -> None:
        source = ModelSource(path=policy)
        self.built.append((source.causal_lm(), source.has_tokenizer, server, log, work))

    def __enter__(self) -> None:
        if self.problem is not None:
            raise self.problem


@pytest.fixture
def built(monkeypatch, tmp_path) -> list[tuple[Any, ...]]:
    monkeypatch.setattr(run_server, "ServerProcess", Fake)
    monkeypatch.setattr(Fake, "built", [])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return Fake.built


def test_first_process_starts_it_in_the_precision_of_the_training(built, make_lm, tmp_path):
    policy = PolicyModel(make_lm("llama").bfloat16())
    run = tmp_path / "run"
    _, url = run_server.start_for_run(policy, LocalServer(max_model_len=9), OfTwo(0, run))
    [(network, has_tokenizer, server, log, work)] = built
    assert url == URL
    assert torch.equal(network.lm_head.weight, policy.network.lm_head.weight.float())
    assert not has_tokenizer
    assert server == LocalServer(max_model_len=9, dtype="bfloat16")
    assert (log, work.parent) == (run / "vllm.log", tmp_path)
    run_server.start_for_run(policy, LocalServer(dtype="float32"), None)
    assert built[1][2].dtype == "float32"


def test_other_processes_are_told_its_address(built, make_lm, tmp_path):
    process, url = run_server.start_for_run(PolicyModel(make_lm("llama")), LocalServer(), OfTwo(1, tmp_path))
    assert (process, url, built) == (None, URL, [])
    assert list(tmp_path.iterdir()) == []


def test_processes_on_several_machines_are_refused(built, make_lm, tmp_path):
    with pytest.raises(EngineError, match="starts a server on one machine, and the run is on 2"):
        run_server.start_for_run(PolicyModel(make_lm("llama")), LocalServer(), OfTwo(0, tmp_path, other="elsewhere"))
    assert built == []


@pytest.mark.parametrize("problem", [ValueError("no vLLM"), EngineError("it died"), OSError("no room")])
def test_failed_start_reaches_all_processes(built, make_lm, tmp_path, monkeypatch, problem):
    monkeypatch.setattr(Fake, "problem", problem)
    for ranks in (None, OfTwo(0, tmp_path / "run")):
        with pytest.raises(type(problem), match=str(problem)):
            run_server.start_for_run(PolicyModel(make_lm("llama")), LocalServer(), ranks)


def test_adapter_is_folded_in(built, make_lm, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    policy = PolicyModel(get_peft_model(make_lm("llama"), config))
    run_server.start_for_run(policy, LocalServer(), OfTwo(0, tmp_path))
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(built[0][0].eval()(ids).logits, policy.network.eval()(ids).logits)
