"""Switches of the engines that sample outside, against a server that speaks vLLM's routes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fake_vllm import GENERATE, FakeVLLM, vllm_installed
from peft import LoraConfig, get_peft_model
from switch_bench import Bench
from switch_harness import Table, case, to
from switch_rewards import letters
from switch_run import _loader

from lightning_rlhf.engines import (
    NCCL,
    AdapterFolder,
    EngineError,
    LocalServer,
    Request,
    SamplingParams,
    SharedFolder,
    VLLMServer,
    WeightSync,
)
from lightning_rlhf.models import PolicyModel
from lightning_rlhf.modules import PPOModule


def table(bench: Bench) -> Table:
    one, two = FakeVLLM(bench.policy), FakeVLLM(bench.policy)
    policy = PolicyModel(copy.deepcopy(bench.policy).eval(), bench.tokenizer)
    elsewhere = bench.root / "weights"
    elsewhere.mkdir()

    def asked(engine: VLLMServer) -> dict[str, Any]:
        """What the servers saw of a transfer and a rollout, and how it ended."""
        for server in (one, two):
            server.calls.clear()
            server.busiest = 0
        request = Request(
            prompts=bench.prompts,
            samples=1,
            uniforms=None,
            params=SamplingParams(max_new_tokens=3),
            end_tokens=policy.end_tokens,
        )
        ended = "well"
        try:
            engine.load(policy, 0)
            engine.generate(request)
        except EngineError as error:
            ended = type(error).__name__
        finally:
            engine.close()
        return {"servers": [len(server.bodies()) for server in (one, two)], "ended": ended}

    def faulty(fault: Any, calls: int) -> Any:
        """From an observer to one of a server whose first rollout requests fail."""

        def observe(engine: VLLMServer) -> str:
            left = [calls]

            def fail(path: str, body: dict[str, Any]) -> Any:
                rolls = path == GENERATE and "n" in body["sampling_params"]
                left[0] -= rolls
                return fault if rolls and left[0] >= 0 else None

            one.fault = fail
            ended = asked(engine)["ended"]
            one.fault = lambda path, body: None
            return ended

        return observe

    def abreast(engine: VLLMServer) -> bool:
        one.fault = lambda path, body: 0.05
        asked(engine)
        one.fault = lambda path, body: None
        return one.busiest > 1

    def inaccurate(engine: VLLMServer) -> str:
        def lie(path: str, body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
            for entry in (answer.get("prompt_logprobs") or [])[1:]:
                for number in entry.values():
                    number["logprob"] += 0.01
            return answer

        one.lie = lie
        ended = asked(engine)["ended"]
        one.lie = lambda path, body, answer: answer
        return ended

    def accepted(engine: VLLMServer) -> str:
        try:
            return str(replace(engine, urls=["http://10.0.0.5:8000"]).urls)
        except ValueError:
            return "refused"

    def versions(engine: VLLMServer) -> list[str]:
        """Weights that drew each of three rollouts."""
        one.calls.clear()
        module = PPOModule(
            copy.deepcopy(bench.policy),
            letters,
            engine=engine,
            lr=0.01,
            tokenizer=bench.tokenizer,
            generation=SamplingParams(max_new_tokens=3),
        )
        batch = {"prompts": bench.prompts, "next_prompts": bench.prompts}
        bench.trainer().fit(module, _loader(batch, batch, batch))
        drawn = [body["cache_salt"] for body in one.bodies() if "n" in body["sampling_params"]]
        return [label.partition("-")[0] for label in drawn]

    def beside(engine: VLLMServer) -> dict[str, Any]:
        """As `asked`, where the server that the run starts is the second."""
        with mock.patch("lightning_rlhf.engines.vllm.server.start_for_run", return_value=(None, two.url)):
            return asked(engine)

    def adapter_place(sync: WeightSync) -> str:
        """Folder that the servers read an adapter from, but for its own random name."""
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        adapted = PolicyModel(get_peft_model(copy.deepcopy(bench.policy), config).eval(), bench.tokenizer)
        engine = VLLMServer(urls=[one.url], sync=sync)
        one.calls.clear()
        engine.load(adapted, 0)
        engine.close()
        return str(Path(one.bodies("/v1/load_lora_adapter")[0]["lora_path"]).parent.parent)

    def place(sync: WeightSync) -> str:
        """Folder that the servers read from, but for its own random name."""
        asked(VLLMServer(urls=[one.url], sync=sync))
        path = one.bodies("/collective_rpc")[0]["kwargs"]["weights_path"]
        return str(Path(path).parent.parent)

    def group(sync: WeightSync) -> list[Any]:
        with vllm_installed() as trainer:
            trainer.servers.append(one)
            asked(VLLMServer(urls=[one.url], sync=sync))
            return [trainer.made[0].info.master_address, trainer.made[0].info.master_port]

    usual = {"urls": [one.url], "patience": 0.01, "timeout": 20.0}
    return {
        AdapterFolder: case(adapter_place, folder=to(str(elsewhere))),
        NCCL: case(group, address=to("10.0.0.1"), port=to(7000)),
        SharedFolder: case(place, folder=to(str(elsewhere))),
        VLLMServer: case(
            asked,
            usual,
            urls=to([one.url, two.url]),
            serve=to(LocalServer(), by=beside),
            sync=to(SharedFolder(str(elsewhere)), by=lambda engine: place(engine.sync)),
            overlap=to(True, by=versions),
            concurrency=to(1, by=abreast),
            timeout=to(0.1, by=faulty(0.5, 4)),
            patience=to(20.0, by=faulty(500, 2)),
            tolerance=to(1e-6, by=inaccurate),
            private_network=to(True, by=accepted),
        ),
    }
