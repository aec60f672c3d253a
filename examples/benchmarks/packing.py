"""Update time with geometric response lengths: microbatches with padding against packed ones, the same rollout.

    python examples/benchmarks/packing.py

Responses of random tokens, of geometric lengths with a cap, are read forward and backward in microbatches of so many
tokens, padded and packed in turns. Writes packing.csv: the tokens that went through the network's first linear map,
and the seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from table import show, write
from torch import nn
from transformers import AutoModelForCausalLM
from turns import prepared
from work import Work, parsed, parser, works

from lightning_rlhf.models import PolicyModel
from lightning_rlhf.models.microbatching import pieces_of
from lightning_rlhf.types import Rollout

Row = dict[str, Any]


def arguments(args: Sequence[str] | None) -> Any:
    options = parser(__doc__.splitlines()[0], models=["smollm2"])
    options.add_argument("--prompts", type=int, default=16, help="of 16 to 64 tokens")
    options.add_argument("--samples", type=int, default=4, help="responses to each")
    options.add_argument("--mean", type=float, default=64, help="of the geometric distribution, tokens")
    options.add_argument("--cap", type=int, default=256, help="longest response, tokens")
    options.add_argument("--budget", type=int, default=2048, help="microbatch_tokens")
    options.add_argument("--repeats", type=int, default=3, help="measured turns of each side")
    return parsed(options, args, prompts=4, samples=2, mean=6, cap=20, budget=64, repeats=1)


def rollout_of(chosen: Any, vocabulary: int) -> Rollout:
    """Random tokens of geometric lengths, the responses to a prompt in consecutive rows."""
    generator = torch.Generator(chosen.device).manual_seed(0)
    count = chosen.prompts * chosen.samples
    lengths = torch.empty(count).geometric_(1 / chosen.mean, generator=generator).clamp(max=chosen.cap).long()
    group = torch.arange(chosen.prompts).repeat_interleave(chosen.samples)
    shortest, longest = (chosen.cap // 16, chosen.cap // 4)
    prompts = torch.randint(shortest, longest + 1, (chosen.prompts,), generator=generator)
    tokens = torch.randint(0, vocabulary, (count, longest + int(lengths.max())), generator=generator)
    tokens[:, :longest] = tokens[group * chosen.samples, :longest]
    columns = torch.arange(tokens.shape[1])
    real = (columns >= longest - prompts[group][:, None]) & (columns < longest + lengths[:, None])
    zeros = torch.zeros(count, tokens.shape[1] - longest)
    return Rollout(
        tokens=tokens,
        attention_mask=real,
        response_mask=real[:, longest:],
        ended=torch.ones(count, dtype=torch.bool),
        prompt_index=group,
        sampler_logprobs=zeros,
        entropy=zeros,
        logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
    )


def policy_of(work: Work, *, packed: bool) -> PolicyModel:
    network = AutoModelForCausalLM.from_pretrained(work.folder, attn_implementation=work.attention)
    policy = PolicyModel(network.to(work.device).train())
    if packed:
        policy.backbone.pack()
    return policy


def turn(policy: PolicyModel, work: Work, rollout: Rollout, budget: int) -> Row:
    """Read a rollout forward and backward, microbatch by microbatch."""
    packed, seen = policy.backbone.packs, []
    first = next(module for module in policy.backbone.module.modules() if isinstance(module, nn.Linear))
    hook = first.register_forward_hook(lambda _, __, states: seen.append(states.shape[:-1].numel()))
    wall, cpu = time.perf_counter(), time.process_time()
    pieces = pieces_of(rollout, rows=None, tokens=budget, packed=packed)
    for piece in pieces:
        with torch.autocast(work.device, torch.bfloat16, enabled=work.precision != "32-true"):
            logprobs = policy.response_logprobs(rollout.select(piece), temperature=1.0)
        logprobs.sum().backward()
    if work.device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    hook.remove()
    norm = float(torch.stack([weight.grad.float().norm() for weight in policy.parameters()]).norm())
    policy.zero_grad()
    side = "packed" if packed else "padded"
    return {"side": side, "tokens": sum(seen), "passes": len(pieces), "wall_s": wall, "cpu_s": cpu, "grad_norm": norm}


def measured(work: Work, chosen: Any) -> list[Row]:
    """A row for each turn, the sides in turns; the first of each warms up and is left out."""
    policies = [policy_of(work, packed=packed) for packed in (False, True)]
    with torch.device(work.device):
        rollout = rollout_of(chosen, policies[0].network.config.vocab_size)
    named = {"model": work.model, "precision": work.precision, "attention": work.attention}
    named |= {"real": int(rollout.response_mask.sum()) + int(rollout.prompt_lengths[:: chosen.samples].sum())}
    turns = [
        named | {"repeat": repeat} | turn(policy, work, rollout, chosen.budget)
        for repeat in range(chosen.repeats + 1)
        for policy in policies
    ]
    return [row for row in turns if row["repeat"] > 0]


def gains(rows: Sequence[Row]) -> Row:
    """Padded over packed, turn by turn, the median."""
    sides = {side: [row for row in rows if row["side"] == side] for side in ("padded", "packed")}
    pairs = list(zip(sides["padded"], sides["packed"], strict=True))
    return {name: median(one[name] / other[name] for one, other in pairs) for name in ("tokens", "wall_s", "cpu_s")}


def main(args: Sequence[str] | None = None) -> None:
    chosen = arguments(args)
    torch.set_num_threads(chosen.threads)
    rows: list[Row] = []
    for base in works(chosen):
        with prepared(base) as work:
            own = measured(work, chosen)
        rows += own
        show(own)
        print(f"padded over packed: { {name: round(value, 2) for name, value in gains(own).items()} }\n")
    write(chosen.out / "packing.csv", rows)
    print(f"packing.csv is in {chosen.out}")


if __name__ == "__main__":
    main()
