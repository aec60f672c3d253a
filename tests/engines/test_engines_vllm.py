"""vLLM server as engine, against a server that speaks its routes: order, weights, lies and faults."""

from __future__ import annotations

import contextlib
import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_vllm import GENERATE, FakeVLLM, serving

from lightning_rlhf import PPOModule
from lightning_rlhf.engines import (
    AdapterFolder,
    EngineError,
    Request,
    SamplingParams,
    SharedFolder,
    VLLMServer,
    check_sampled,
    sample,
)
from lightning_rlhf.engines.vllm.canary import Canary
from lightning_rlhf.models import ModelSource, PolicyModel

PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15, 16]]
LENGTH = 6


@pytest.fixture
def policy(make_lm):
    return PolicyModel(make_lm("llama").double().eval())


@pytest.fixture
def server(policy):
    with serving(policy.network) as fake:
        yield fake


@pytest.fixture
def connect(tmp_path):
    """An engine on servers, which is closed at the end."""
    engines = []

    def make(*servers: FakeVLLM, **options) -> VLLMServer:
        folder = SharedFolder(str(tmp_path))
        usual = {"urls": [server.url for server in servers], "sync": folder, "patience": 0.05, "timeout": 5.0}
        engines.append(VLLMServer(**(usual | options)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def asked(policy, left_padded):
    def make(samples: int = 1, *, temperature: float = 1.0, greedy: bool = False, prompts=PROMPTS) -> Request:
        rows = len(prompts) * samples
        return Request(
            prompts=left_padded(prompts),
            samples=samples,
            uniforms=None if greedy else torch.rand(rows, LENGTH, dtype=torch.float64),
            params=SamplingParams(max_new_tokens=LENGTH, temperature=temperature),
            end_tokens=policy.end_tokens,
        )

    return make


@torch.no_grad()
def move(policy: PolicyModel, size: float = 0.1) -> None:
    for weight in policy.parameters():
        weight.mul_(1 + size * torch.randn_like(weight))


@torch.no_grad()
def move_adapter(policy: PolicyModel) -> None:
    for name, weight in policy.named_parameters():
        if "lora_" in name:
            weight.mul_(1 + 0.3 * torch.randn_like(weight))


def confirmed(engine: VLLMServer, policy: PolicyModel, request: Request) -> None:
    rollout = engine.generate(request).rollout(request.prompts)
    with torch.no_grad():
        logprobs = policy.response_logprobs(rollout, temperature=request.params.temperature)
    engine.confirm(rollout, logprobs, same_weights=True)


# What goes out and what comes back


def test_greedy_tokens_are_those_of_the_process_after_each_transfer(policy, server, connect, asked):
    engine, request = connect(server), asked(greedy=True)
    for version in range(3):
        engine.load(policy, version)
        sampled = engine.generate(request)
        check_sampled(sampled, request, version)
        assert torch.equal(sampled.tokens, sample(policy, request.prompts, None, request.params).tokens)
        move(policy)


def test_prompts_are_dealt_over_servers_and_order_is_restored(policy, connect, asked):
    with serving(policy.network) as one, serving(policy.network) as two:
        engine, request = connect(one, two), asked(samples=2, greedy=True)
        engine.load(policy, 0)
        one.fault = lambda path, body: 0.2 if path == GENERATE else None  # the other overtakes it
        before = len(one.bodies()), len(two.bodies())
        sampled = engine.generate(request)
        expected = sample(policy, request.prompts, None, request.params, samples=2)
        assert torch.equal(sampled.tokens, expected.tokens)
        assert [len(one.bodies()) - before[0], len(two.bodies()) - before[1]] == [3, 2]
        assert sorted(map(tuple, (body["token_ids"] for body in two.bodies()[before[1] :]))) == [(8,), (11, 12, 13, 14)]


def test_requests_are_concurrent_up_to_the_limit(policy, server, connect, asked):
    for limit in (1, 3):
        server.busiest = 0
        engine = connect(server, concurrency=limit)
        engine.load(policy, 0)
        engine.generate(asked(prompts=PROMPTS * 4))
        assert server.busiest <= limit


def test_filters_are_off_and_ends_are_the_policy_s(policy, server, connect, asked):
    engine = connect(server)
    engine.load(policy, 0)
    engine.generate(asked(samples=3, temperature=0.7))
    body = server.bodies()[-1]
    assert body["token_ids"] in PROMPTS
    off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
    off |= {"frequency_penalty": 0.0, "ignore_eos": True, "temperature": 0.7, "n": 3, "max_tokens": LENGTH}
    assert off.items() <= body["sampling_params"].items()
    assert body["sampling_params"]["stop_token_ids"] == policy.end_tokens
    assert "seed" not in body["sampling_params"]  # it ends vLLM on a CPU
    assert body["cache_salt"] == server.version


def test_cache_is_cleared_and_folders_do_not_pile_up(policy, server, connect, tmp_path):
    engine = connect(server)
    for version in range(3):
        engine.load(policy, version)
        move(policy)
    paths = [path for path, _ in server.calls if path in ("/collective_rpc", "/reset_prefix_cache")]
    assert paths == ["/collective_rpc", "/reset_prefix_cache"] * 3
    assert len(list(tmp_path.glob("*/*"))) == 1
    engine.close()
    assert not list(tmp_path.iterdir())


def test_adapter_is_folded_in(make_lm, connect, asked):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    network = make_lm("llama").double().eval()
    with serving(network) as fake:
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        policy = PolicyModel(peft.get_peft_model(network, config).double().eval())
        engine, request = connect(fake), asked(greedy=True)
        engine.load(policy, 0)
        expected = sample(policy, request.prompts, None, request.params)
        assert torch.equal(engine.generate(request).tokens, expected.tokens)


def test_adapter_alone_is_sent_and_the_one_before_taken_out(make_lm, asked, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    network = make_lm("llama").double().eval()
    with serving(network) as fake:
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        policy = PolicyModel(peft.get_peft_model(network, config).double().eval())
        engine = VLLMServer(urls=[fake.url], sync=AdapterFolder(str(tmp_path)), patience=0.05)
        request = asked(greedy=True)
        for version in range(3):
            engine.load(policy, version)
            expected = sample(policy, request.prompts, None, request.params)
            assert torch.equal(engine.generate(request).tokens, expected.tokens)
            move_adapter(policy)
        assert list(fake.adapters) == [fake.version]
        assert not fake.bodies("/collective_rpc")  # the base model stays
        written = sum(weight.nbytes for name, weight in policy.named_parameters() if "lora_" in name)
        assert engine.metrics()["sync/gib"] * 2**30 < 3 * written
        engine.close()


def test_adapter_folder_needs_an_adapter(policy, server):
    with pytest.raises(ValueError, match=r"the policy has none: take SharedFolder\(\)"):
        VLLMServer(urls=[server.url], sync=AdapterFolder(), patience=0.05).load(policy, 0)


def test_long_prompts_are_refused_with_the_flag(policy, connect, asked):
    with serving(policy.network, max_model_len=8) as fake:
        engine = connect(fake)
        engine.load(policy, 0)
        with pytest.raises(EngineError, match=r"take 8 tokens.*up to 10.*--max-model-len"):
            engine.generate(asked())


# Lies


def stale(fake: FakeVLLM) -> None:
    """The weights of another folder, under the right name."""
    network = copy.deepcopy(fake.network)
    fake.read = lambda folder: fake.network.load_state_dict(network.state_dict())  # type: ignore[method-assign]


def test_skipped_transfer_is_caught_however_small(policy, server, connect):
    engine = connect(server)
    engine.load(policy, 0)
    server.reads = False
    move(policy, 1e-7)
    with pytest.raises(EngineError, match="still has earlier weights"):
        engine.load(policy, 1)


def test_earlier_folder_is_caught(policy, server, connect):
    engine = connect(server)
    engine.load(policy, 0)
    stale(server)
    move(policy, 1e-7)
    with pytest.raises(EngineError, match="still has earlier weights"):
        engine.load(policy, 1)


def test_other_weights_are_caught(policy, make_lm, connect):
    with serving(make_lm("llama", seed=5).double()) as fake:
        fake.reads = False
        with pytest.raises(EngineError, match="does not compute what the trainer does"):
            connect(fake).load(policy, 0)


def test_weights_that_drift_from_the_trainer_are_caught(policy, server, connect):
    engine = connect(server)
    engine.load(policy, 0)
    move(policy)

    def read(folder: Path) -> None:
        FakeVLLM.read(server, folder)
        with torch.no_grad():
            server.network.lm_head.weight.mul_(1.05)

    server.read = read
    with pytest.raises(EngineError, match="does not have the weights that were sent"):
        engine.load(policy, 1)


def test_transfer_that_changes_nothing_is_none_that_was_lost(policy, server, connect):
    engine = connect(server)
    engine.load(policy, 0)
    engine.load(policy, 1)
    assert engine.metrics()["sync/canary"] < 1e-9


def forget_the_name(path: str, body: dict, answer: dict) -> dict:
    for choice in answer.get("choices", []):
        choice["weight_versions"] = [{"version": "default", "start": 0, "end": len(choice["token_ids"])}]
    return answer


def draw_the_end_by_others(path: str, body: dict, answer: dict) -> dict:
    for choice in answer.get("choices", []):
        choice["weight_versions"][0]["end"] -= 1
    return answer


def cut_logprobs(path: str, body: dict, answer: dict) -> dict:
    for choice in answer.get("choices", []):
        choice["logprobs"]["content"].pop()
    return answer


def lose_a_response(path: str, body: dict, answer: dict) -> dict:
    answer["choices"] = answer.get("choices", [])[1:]
    return answer


def abort(path: str, body: dict, answer: dict) -> dict:
    for choice in answer.get("choices", []):
        choice["finish_reason"] = "abort"
    return answer


def leave_out_a_field(path: str, body: dict, answer: dict) -> dict:
    for choice in answer.get("choices", []):
        del choice["token_ids"]
    return answer


def go_on_after_the_end(path: str, body: dict, answer: dict) -> dict:
    for choice in answer.get("choices", []):
        choice["token_ids"][:] = [20] * len(choice["token_ids"])
        for entry in choice["logprobs"]["content"]:
            entry["token_id"] = 20
    return answer


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (forget_the_name, "by weights default"),
        (draw_the_end_by_others, r"drew \d of \d tokens"),
        (cut_logprobs, "log-probs of other tokens"),
        (lose_a_response, "returned 0 responses"),
        (abort, "'abort'"),
        (leave_out_a_field, "left out or mistyped"),
        (go_on_after_the_end, "without an end token"),
    ],
)
def test_incomplete_answers_are_caught(policy, server, connect, asked, lie, said):
    engine, request = connect(server), asked(prompts=PROMPTS * 6)
    engine.load(policy, 0)
    server.lie = lie
    with pytest.raises(EngineError, match=said):
        check_sampled(engine.generate(request), request, 0)


def test_answer_to_another_request_is_caught_by_its_name(policy, server, connect, asked):
    engine = connect(server)
    engine.load(policy, 0)
    server.lie = lambda path, body, answer: answer | {"request_id": "generate-tokens-other"}
    with pytest.raises(EngineError, match="answered request generate-tokens-other"):
        engine.generate(asked())


def test_tokens_of_another_request_are_caught_by_their_log_probs(policy, server, connect, asked):
    engine, request = connect(server, concurrency=1), asked(prompts=PROMPTS * 4)
    policy.network.generation_config.eos_token_id = 35
    request = replace(request, end_tokens=[35], params=replace(request.params, max_new_tokens=12))
    request = replace(request, uniforms=torch.rand(20, 12, dtype=torch.float64))
    engine.load(policy, 0)
    confirmed(engine, policy, request)
    former: list[dict] = []

    def swap(path: str, body: dict, answer: dict) -> dict:
        if not answer.get("choices"):
            return answer
        former.append(answer)
        return answer | {"choices": former[-2]["choices"]} if len(former) % 5 == 0 else answer

    server.lie = swap
    with pytest.raises(EngineError, match="those of response"):
        confirmed(engine, policy, request)


def test_log_probs_before_the_temperature_are_caught(policy, server, connect, asked):
    engine, request = connect(server), asked(samples=4, temperature=0.5)
    engine.load(policy, 0)
    confirmed(engine, policy, request)

    def raw(path: str, body: dict, answer: dict) -> dict:
        for choice in answer.get("choices", []):
            ids = body["token_ids"] + choice["token_ids"]
            table = server.network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            for place, entry in enumerate(choice["logprobs"]["content"]):
                entry["logprob"] = float(table[len(body["token_ids"]) + place - 1, entry["token_id"]])
        return answer

    server.lie = raw
    with pytest.raises(EngineError, match="before the temperature"):
        confirmed(engine, policy, request)


# Faults


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (500, "failed at .*status 500: .*on purpose"),
        ("drop", "did not answer"),
        ("half", "did not answer .* in full"),
        ("text", "something else than JSON"),
        (1.0, "did not answer .*ReadTimeout"),
    ],
)
def test_fault_is_tried_again_for_a_while(policy, server, connect, asked, fault, said, monkeypatch):
    monkeypatch.setattr("lightning_rlhf.engines.vllm.client.PAUSE", 0.01)
    engine = connect(server, patience=20.0, timeout=0.5)
    engine.load(policy, 0)
    left = [3]

    def fail(path: str, body: dict) -> object:
        left[0] -= 1
        return fault if path == GENERATE and left[0] >= 0 else None

    server.fault = fail
    request = asked(greedy=True)
    assert torch.equal(engine.generate(request).tokens, sample(policy, request.prompts, None, request.params).tokens)
    server.fault = lambda path, body: fault if path == GENERATE else None
    engine = connect(server, patience=0.05, timeout=0.2)
    server.fault, always = (lambda path, body: None), server.fault
    engine.load(policy, 1)
    server.fault = always
    with pytest.raises(EngineError, match=said):
        engine.generate(request)


def test_transfer_is_made_once_and_fails_with_a_sentence(policy, server, connect):
    engine = connect(server, patience=5.0)
    server.fault = lambda path, body: 500 if path == "/collective_rpc" else None
    with pytest.raises(EngineError, match="failed at /collective_rpc"):
        engine.load(policy, 0)
    assert len(server.bodies("/collective_rpc")) == 1


@pytest.mark.parametrize("status", [403, 404])
def test_missing_route_names_the_command_that_has_it(policy, server, connect, status):
    server.fault = lambda path, body: status if path == "/weight_info" else None
    with pytest.raises(EngineError, match="no route /weight_info .*: start it by `lightning-rlhf serve`"):
        connect(server).load(policy, 0)


class Two:
    """The first of two processes, with what they agreed on."""

    rank, world, device = 0, 2, torch.device("cpu")

    def __init__(self) -> None:
        self.problems: list[Exception | None] = []

    def sum(self, x):
        return x

    def gather_text(self, text: str) -> str:
        return text

    def agree(self, problem: Exception | None) -> None:
        self.problems.append(problem)
        if problem is not None:
            raise problem


@pytest.mark.parametrize("place", ["send", "check"])
def test_any_failure_of_a_transfer_reaches_the_other_processes(policy, server, connect, monkeypatch, place):
    def broken(*_: object, **__: object) -> None:
        raise ValueError("of no kind that was foreseen")

    engine, ranks = connect(server), Two()
    engine.attach(ranks)
    target = engine.sync if place == "send" else Canary
    monkeypatch.setattr(target, place, broken)
    with pytest.raises(ValueError, match="of no kind"):
        engine.load(policy, 0)
    assert [type(problem) for problem in ranks.problems] == [type(None), ValueError]


def test_step_without_a_transfer_logs_none(policy, server, connect):
    engine = connect(server)
    engine.load(policy, 0)
    first, second = engine.metrics(), engine.metrics()
    assert first["sync/seconds"] > 0
    assert first["sync/gib"] > 0
    assert (second["sync/seconds"], second["sync/gib"], second["time/sync"]) == (0.0, 0.0, 0.0)


def test_failed_connection_leaves_nothing_half_made(policy, server, connect, asked):
    engine, request = connect(server), asked(greedy=True)
    server.fault = lambda path, body: 500 if path == "/v1/models" else None
    with pytest.raises(EngineError, match="failed at /v1/models"):
        engine.load(policy, 0)
    server.fault = lambda path, body: None
    engine.load(policy, 0)
    assert torch.equal(engine.generate(request).tokens, sample(policy, request.prompts, None, request.params).tokens)


def test_dead_server_is_named(policy, server, connect, asked):
    engine = connect(server)
    engine.load(policy, 0)
    server.stop()
    with pytest.raises(EngineError, match=re.escape(server.url) + ".*resume the run"):
        engine.generate(asked())


def test_failure_asks_no_further_prompt(policy, server, connect, asked):
    engine = connect(server, concurrency=1)
    engine.load(policy, 0)
    server.fault = lambda path, body: 400 if path == GENERATE else None
    before = len(server.bodies(GENERATE))
    with pytest.raises(EngineError):
        engine.generate(asked(prompts=PROMPTS * 4))
    assert len(server.bodies(GENERATE)) - before < 5 * 4 // 2


def test_log_probs_of_another_fixed_text_are_caught(policy, server, connect):
    def other(path: str, body: dict, answer: dict) -> dict:
        return answer | {"prompt_logprobs": [{} for _ in answer.get("prompt_logprobs") or []]}

    server.lie = other
    with pytest.raises(EngineError, match="another text than the fixed one"):
        connect(server).load(policy, 0)


def test_restarted_server_is_found_out(policy, server, connect, asked):
    engine = connect(server)
    engine.load(policy, 0)
    server.version = "default"
    with pytest.raises(EngineError, match="it was restarted"):
        engine.generate(asked())


def test_full_disk_names_the_folder(policy, server, connect, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_rlhf.engines.vllm.sync.write_network", full)
    with pytest.raises(OSError, match="weights for the vLLM servers"):
        connect(server).load(policy, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"urls": []}, "`urls` is empty"),
        ({"urls": ["ftp://127.0.0.1"]}, "no address"),
        ({"urls": ["http://127.0.0.1:80/v1"]}, "no address"),
        ({"urls": ["http://10.0.0.5:8000"]}, "private_network"),
        ({"urls": ["http://example.org:8000"]}, "private_network"),
        ({"urls": ["http://127.0.0.1:1"], "timeout": 0.0}, "timeout"),
        ({"urls": ["http://127.0.0.1:1"], "concurrency": 0}, "concurrency"),
        ({"urls": ["http://127.0.0.1:1"], "tolerance": -1.0}, "tolerance"),
    ],
)
def test_wrong_arguments_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        VLLMServer(**options)


def test_other_machines_can_be_named():
    for options in ({"urls": ["http://10.0.0.5:8000"], "private_network": True}, {"urls": ["https://example.org"]}):
        assert VLLMServer(**options).urls == options["urls"]


# Runs


@pytest.fixture
def make_ppo(make_folder, token_reward):
    source = make_folder("llama")

    def make(engine: VLLMServer | None, **options) -> PPOModule:
        torch.manual_seed(0)
        usual = {"generation": SamplingParams(max_new_tokens=LENGTH, temperature=0.8, seed=1), "lr": 0.01}
        return PPOModule(ModelSource(path=source), token_reward(), engine=engine, **(usual | options))

    return make


def batches(left_padded, count: int = 3) -> list[dict]:
    return [{"prompts": left_padded(PROMPTS)} for _ in range(count)]


def test_run_learns_by_a_server(make_ppo, make_lm, connect, make_trainer, as_loader, left_padded, recorder):
    with serving(make_lm("llama").double()) as fake:
        module = make_ppo(connect(fake))
        trainer = make_trainer(callbacks=[recorder])
        trainer.fit(module, as_loader(batches(left_padded)), as_loader([left_padded(PROMPTS)]))
        steps = recorder.steps
        assert [body["new_version"].partition("-")[0] for body in fake.bodies("/update_weight_version")] == [
            *("0", "1", "2"),
            "3",  # the validation sees what the last update left
        ]
        assert all(step["policy/kl_sampler"] < 1e-9 for step in steps)
        assert {"sync/seconds", "sync/gib", "sync/canary", "policy/sampler_ess"} <= steps[0].keys()
        assert all(step["sync/canary"] < 1e-9 for step in steps)
        assert steps[1]["policy/approxkl_avg"] < 1e-12
        assert not module.engine._clients  # closed with the run


def test_run_that_stops_goes_on_when_the_server_is_back(
    make_ppo, make_lm, connect, make_trainer, as_loader, left_padded, tmp_path
):
    data = batches(left_padded, 4)
    with serving(make_lm("llama").double()) as fake:
        module = make_ppo(connect(fake))
        trainer = make_trainer(max_epochs=2)
        fake.fault = lambda path, body: 500 if fake.version.startswith("3") and path == GENERATE else None
        with contextlib.suppress(EngineError):
            trainer.fit(module, as_loader(data))
        assert module.iteration == 3
        trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    with serving(make_lm("llama").double()) as back:
        module = make_ppo(connect(back))
        trainer = make_trainer(max_epochs=2)
        trainer.fit(module, as_loader(data), ckpt_path=tmp_path / "stopped.ckpt")
        assert module.iteration == 8
        assert back.bodies("/update_weight_version")[0]["new_version"].startswith("3-")


def test_correction_is_on_by_default_and_only_outside(make_ppo):
    from lightning_rlhf.core import Clip, TruncatedIS

    inside, outside = make_ppo(None), make_ppo(VLLMServer(urls=["http://127.0.0.1:1"]))
    assert isinstance(inside.algorithm.surrogate, Clip)
    assert isinstance(outside.algorithm.surrogate, TruncatedIS)
