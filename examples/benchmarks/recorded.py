"""Rollout time on a GPU with passes recorded as a CUDA graph, and without: the same weights, prompts and numbers.

    python examples/benchmarks/recorded.py --models medium tiny

Half of the rollouts let responses run to their full length; in the others the end token has the same probability at
every position, so that rows leave and passes are recorded anew. Both ways take turns. Writes recorded.csv.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from models import Ending, prompts_of, tokenizer_of
from table import show, write
from turns import prepared
from work import Work, parsed, parser, works

from lightning_rlhf import ModelSource, SamplingParams
from lightning_rlhf.engines import Sampled, row_uniforms, sample, slots
from lightning_rlhf.models import PolicyModel
from lightning_rlhf.types import PromptBatch

Row = dict[str, Any]


def arguments(args: Sequence[str] | None) -> Any:
    options = parser(__doc__.splitlines()[0], models=["medium"], device="cuda", attention="sdpa")
    options.add_argument("--rows", nargs="+", type=int, default=[128, 512], help="responses of a rollout, two a prompt")
    options.add_argument("--tokens", type=int, default=128, help="longest response")
    options.add_argument("--mean", type=float, default=48, help="of the geometric lengths, tokens")
    options.add_argument("--repeats", type=int, default=3, help="rollouts of each way; the first warms up")
    return parsed(options, args, rows=[8], tokens=16, mean=4, repeats=2)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Inside it every pass is launched kernel by kernel."""
    recordable, slots.recordable = slots.recordable, lambda network: False
    try:
        yield
    finally:
        slots.recordable = recordable


def timed(sampler: Callable[..., Sampled], batch: PromptBatch, uniforms: torch.Tensor) -> Row:
    """Both ends wait for the GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    response = sampler(batch, uniforms, samples=2).response_mask
    torch.cuda.synchronize()
    seconds, tokens = time.perf_counter() - start, int(response.sum())
    return {
        "wall_s": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "longest": int(response.sum(1).max()),
    }


def measured(work: Work, rows: int, chosen: Any) -> Iterator[Row]:
    """A row for each rollout of fp32 weights copied to bf16, which is part of its time."""
    network = ModelSource(path=work.folder, attention=work.attention).causal_lm().to(work.device).eval()
    tokenizer = tokenizer_of(work)
    texts = (prompts_of(work) * rows)[: rows // 2]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(work.device)
    real = torch.ones(len(texts), dtype=torch.bool, device=work.device)
    batch = PromptBatch(prompts.input_ids, prompts.attention_mask.bool(), real, [])
    policy = PolicyModel(network, tokenizer)
    params = SamplingParams(max_new_tokens=work.tokens, dtype="bfloat16")
    sampler = partial(sample, policy, params=params)
    for lengths, probability in (("full", 0.0), ("geometric", 1 / chosen.mean)):
        Ending.put_on(network, probability)
        for repeat in range(chosen.repeats):
            numbers = row_uniforms(seed=0, stream="x", iteration=repeat, rows=range(rows), length=work.tokens)
            named = {"model": work.model, "rows": rows, "lengths": lengths, "repeat": repeat}
            yield named | {"way": "recorded"} | timed(sampler, batch, numbers)
            with unrecorded():
                yield named | {"way": "pass by pass"} | timed(sampler, batch, numbers)


def main(args: Sequence[str] | None = None) -> None:
    chosen = arguments(args)
    if not torch.cuda.is_available():
        raise SystemExit("passes are recorded on a GPU, and there is none here")
    found: list[Row] = []
    for base in works(chosen):
        with prepared(base.having(tokens=chosen.tokens)) as work:
            for rows in chosen.rows:
                found += measured(work, rows, chosen)
    show(found)
    write(chosen.out / "recorded.csv", found)


if __name__ == "__main__":
    main()
