"""Rollout time with geometric response lengths: our sampler against Hugging Face `generate`, the same prompts.

    python examples/benchmarks/lengths.py

The end token has the same probability at every position on both sides (a hook on the head), so that both draw lengths
of one distribution, geometric with a cap; how many tokens came out is reported, and the ratio is one of tokens/s.
`generate` runs once with all rows at once and once in batches. Writes lengths.csv.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from models import Ending, prompts_of, tokenizer_of
from table import show, write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from turns import prepared
from work import Work, parsed, parser, works

from lightning_rlhf import SamplingParams
from lightning_rlhf.engines import row_uniforms, sample
from lightning_rlhf.models import PolicyModel
from lightning_rlhf.types import PromptBatch

Row = dict[str, Any]
DTYPES = {"bf16-mixed": "bfloat16", "32-true": "float32"}
Rollout = Callable[[int], Tensor]
"""From the number of the repeat to the lengths of the responses, (rows,)."""


def arguments(args: Sequence[str] | None) -> Any:
    options = parser(__doc__.splitlines()[0], models=["tiny"])
    options.add_argument("--rows", type=int, default=64, help="responses of a rollout, one to each prompt")
    options.add_argument("--batch", type=int, default=16, help="rows of `generate` where it runs in batches")
    options.add_argument("--mean", type=float, default=64, help="of the geometric distribution, tokens")
    options.add_argument("--cap", type=int, default=256, help="longest response, tokens")
    options.add_argument("--repeats", type=int, default=3, help="measured rollouts of each side, in turns")
    return parsed(options, args, rows=8, batch=4, mean=4, cap=16, repeats=1)


def network_of(work: Work, dtype: str) -> nn.Module:
    """The same attention kernel for both sides."""
    options = {"dtype": getattr(torch, dtype), "attn_implementation": work.attention}
    network = AutoModelForCausalLM.from_pretrained(work.folder, **options)
    Ending.put_on(network, work.end)
    return network.to(work.device).eval()


def ours(work: Work, chosen: Any, prompts: Any) -> Rollout:
    """fp32 master weights, copied to the sampling dtype in every rollout: the copy is part of the time."""
    network = network_of(work, "float32")
    options = {"max_new_tokens": work.tokens, "dtype": DTYPES[work.precision], **work.options("generation")}
    sampler = partial(sample, PolicyModel(network, tokenizer_of(work)), params=SamplingParams(**options))
    real = torch.ones(chosen.rows, dtype=torch.bool, device=work.device)
    batch = PromptBatch(prompts.input_ids, prompts.attention_mask.bool(), real, [])

    def rollout(repeat: int) -> Tensor:
        names = {"seed": 0, "stream": "lengths", "iteration": repeat}
        uniforms = row_uniforms(**names, rows=range(chosen.rows), length=work.tokens)
        return sampler(batch, uniforms).response_mask.sum(1)

    return rollout


def hugging_face(work: Work, prompts: Any, network: nn.Module, repeat: int, *, batch: int) -> Tensor:
    """`generate` with its defaults, in batches of `batch` rows, pure sampling."""
    torch.manual_seed(repeat)
    end, sampling = network.generation_config.eos_token_id, {"do_sample": True, "top_k": 0, "top_p": 1.0}
    lengths = []
    for ids, mask in zip(prompts.input_ids.split(batch), prompts.attention_mask.split(batch), strict=True):
        drawn = network.generate(ids, attention_mask=mask, max_new_tokens=work.tokens, **sampling)[:, ids.shape[1] :]
        before_end = (drawn != end).long().cumprod(1).sum(1)
        lengths.append((before_end + 1).clamp(max=work.tokens))
    return torch.cat(lengths)


def sides(work: Work, chosen: Any) -> dict[str, Rollout]:
    texts = (prompts_of(work) * chosen.rows)[: chosen.rows]
    prompts = tokenizer_of(work)(texts, return_tensors="pt", padding=True, padding_side="left").to(work.device)
    generate = partial(hugging_face, work, prompts, network_of(work, DTYPES[work.precision]))
    named = {"ours": ours(work, chosen, prompts), "generate, all rows": partial(generate, batch=chosen.rows)}
    return named | {f"generate, {chosen.batch} rows": partial(generate, batch=chosen.batch)}


def timed(rollout: Rollout, repeat: int) -> Row:
    wall, cpu = time.perf_counter(), time.process_time()
    lengths = rollout(repeat)
    wall, cpu, tokens = time.perf_counter() - wall, time.process_time() - cpu, int(lengths.sum())
    found = {"wall_s": wall, "cpu_s": cpu, "tokens": tokens, "mean": tokens / len(lengths)}
    return found | {"longest": int(lengths.max()), "tokens_per_s": tokens / wall, "tokens_per_cpu_s": tokens / cpu}


def measured(work: Work, chosen: Any) -> list[Row]:
    """A row for each rollout, the sides in turns; the first of each warms up and is left out."""
    rows, named = [], {"model": work.model, "precision": work.precision}
    rollouts = sides(work, chosen)
    for repeat in range(chosen.repeats + 1):
        for name, rollout in rollouts.items():
            rows.append(named | {"repeat": repeat, "side": name} | timed(rollout, repeat))
    return [row for row in rows if row["repeat"] > 0]


def speedups(rows: Sequence[Row]) -> Row:
    """Our tokens/s over those of `generate`, repeat by repeat, the median; against its faster way."""
    found = {}
    for name in ("tokens_per_s", "tokens_per_cpu_s"):
        own = {row["repeat"]: row[name] for row in rows if row["side"] == "ours"}
        best = {i: max(row[name] for row in rows if row["repeat"] == i and row["side"] != "ours") for i in own}
        found[name] = median(own[i] / best[i] for i in own)
    return found


def main(args: Sequence[str] | None = None) -> None:
    chosen = arguments(args)
    torch.set_num_threads(chosen.threads)
    rows: list[Row] = []
    for base in works(chosen):
        with prepared(base.having(samples=1, tokens=chosen.cap, end=1 / chosen.mean)) as work:
            own = measured(work, chosen)
        rows += own
        show(own)
        print(f"ours over the faster way of generate: { {k: round(v, 2) for k, v in speedups(own).items()} }\n")
    write(chosen.out / "lengths.csv", rows)
    print(f"lengths.csv is in {chosen.out}")


if __name__ == "__main__":
    main()
