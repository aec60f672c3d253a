"""Interface of engines: what they return is checked, and a run asks any of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_rlhf.engines import (
    Engine,
    EngineError,
    LocalEngine,
    LocalServer,
    Request,
    Sampled,
    SamplingParams,
    VLLMServer,
    check_sampled,
)
from lightning_rlhf.models import PolicyModel

LENGTH, END = 4, 0


@pytest.fixture
def request_of(left_padded):
    def build(prompts=((5, 6), (7,))):
        batch = left_padded([list(prompt) for prompt in prompts])
        uniforms = torch.rand(len(prompts), LENGTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        params = SamplingParams(max_new_tokens=LENGTH)
        return Request(prompts=batch, samples=1, uniforms=uniforms, params=params, end_tokens=[END])

    return build


def whole() -> Sampled:
    """One response that fills its room and one that ends."""
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    tokens = torch.tensor([[5, 6, 7, 8], [9, END, END, END]])
    return Sampled(
        tokens=tokens,
        response_mask=mask,
        ended=torch.tensor([False, True]),
        logprobs=torch.where(mask, -1.0, 0.0),
        entropy=torch.where(mask, 1.0, 0.0),
        versions=torch.full_like(tokens, 3),
    )


def put(field: str, row: int, column: int | None, value: object) -> Sampled:
    sampled = whole()
    changed = getattr(sampled, field).clone()
    changed[(row, column) if column is not None else row] = value
    return sampled._replace(**{field: changed})


def test_whole_responses_pass(request_of):
    check_sampled(whole(), request_of(), version=3)


@pytest.mark.parametrize(
    ("sampled", "said"),
    [
        (put("response_mask", 0, 1, False), "hole"),
        (put("response_mask", 1, slice(0, 2), False), "empty"),
        (put("logprobs", 0, 2, float("nan")), "no log-prob"),
        (put("logprobs", 0, 2, 0.5), "above 0"),
        (put("response_mask", 0, 3, False), "stop without an end token"),
        (put("tokens", 1, 1, 9), "stop without an end token"),
        (put("ended", 0, None, True), "said to have ended"),
        (put("ended", 1, None, False), "go on after one"),
        (put("versions", 0, 3, 2), r"another version.*weights \[2, 3\], and version 3"),
        (whole()._replace(tokens=whole().tokens[:1]), "shape"),
    ],
)
def test_broken_responses_are_refused(request_of, sampled, said):
    with pytest.raises(EngineError, match=said):
        check_sampled(sampled, request_of(), version=3)


def test_engine_and_its_parts_are_built_from_flags(tmp_path):
    class Run:
        def __init__(self, engine: Engine | None = None) -> None:
            self.engine = engine

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Run, "run")
    flags = ["engine=VLLMServer", "engine.urls=[http://127.0.0.1:8000]", "engine.serve.python=ENV/bin/python"]
    flags += ["engine.sync=SharedFolder", f"engine.sync.folder={tmp_path}", "engine.overlap=true"]
    engine = parser.instantiate(parser.parse_args([f"--run.{flag}" for flag in flags])).run.engine
    assert isinstance(engine, VLLMServer)
    assert isinstance(engine.serve, LocalServer)
    assert engine.serve.python == "ENV/bin/python"
    assert (engine.sync.folder, engine.overlap) == (str(tmp_path), True)


def test_local_engine_names_the_version_and_draws_from_today_s_weights(make_lm, request_of):
    policy, engine = PolicyModel(make_lm("llama").eval()), LocalEngine()
    with pytest.raises(RuntimeError, match="call `load`"):
        engine.generate(request_of())
    engine.load(policy, version=3)
    request = replace(request_of(), end_tokens=policy.end_tokens)
    before = engine.generate(request)
    check_sampled(before, request, version=3)
    assert torch.equal(engine.generate(request).tokens, before.tokens)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.3 * torch.ones_like(weight).cumsum(0).cos())
    assert not torch.equal(engine.generate(request).tokens, before.tokens)
