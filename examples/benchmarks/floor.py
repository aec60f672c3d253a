"""The floor: the bare work of a step in plain torch around the Hugging Face network. One process.

No padding masks, no end tokens, no metrics, no trainer: a prompt batch is read as it is padded, every response is
full. What stays is what nobody can leave out: decode, reference forward, forward and backward with logits at response
positions only, clipping, fused AdamW. Where bf16-mixed is asked for, decode and reference use weights copied to bf16,
as we do; training runs under autocast.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from contextlib import contextmanager

import torch
from models import held, prompts_of, tokenizer_of, vader, waiter
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, DynamicCache
from turns import Turns
from work import Work

BLOCK = 256  # of the vocabulary, in sampling


def drawn(logits: Tensor) -> Tensor:
    """Tokens of softmax(logits) by inverse CDF: first the block of the vocabulary, then the token. (B,)."""
    blocks = pad(logits.float().softmax(-1), (0, -logits.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    mass = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device) * mass[:, -1:]
    which = torch.searchsorted(mass, target, right=True)
    inside = blocks[torch.arange(len(logits), device=logits.device), which[:, 0]].cumsum(-1, dtype=torch.float64)
    left = target - pad(mass, (1, 0)).gather(1, which)
    token = torch.searchsorted(inside, left, right=True).clamp(max=BLOCK - 1)
    return (which * BLOCK + token)[:, 0].clamp(max=logits.shape[1] - 1)


def responses(network: nn.Module, prompts: Tensor, samples: int, length: int) -> Tensor:
    """Prompts read once, then one token of all rows per pass. (B·k, length)."""
    cache = DynamicCache(config=network.config)
    logits = network(prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(samples)
    tokens = [drawn(logits.repeat_interleave(samples, 0))]
    while len(tokens) < length:
        logits = network(tokens[-1][:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        tokens.append(drawn(logits))
    return torch.stack(tokens, 1)


def logprobs(network: nn.Module, tokens: Tensor, length: int) -> Tensor:
    """log π of the last `length` tokens, (B, length).

    The states are made contiguous: on a slice of them `linear` with frozen weights becomes a batched product that
    copies the head's weights once for every row.
    """
    states = network.base_model(tokens, use_cache=False).last_hidden_state[:, -length - 1 : -1].contiguous()
    logits = network.lm_head(states).float()
    return logits.gather(-1, tokens[:, -length:, None])[..., 0] - logits.logsumexp(-1)


class Floor:
    """Policy with its optimizer, the weights that sample, and the reference."""

    def __init__(self, work: Work) -> None:
        self.work, self.mixed, self.seconds = work, work.precision == "bf16-mixed", {}
        load = {"dtype": torch.float32, "attn_implementation": work.attention}
        self.wait = waiter(work.device)
        self.policy = AutoModelForCausalLM.from_pretrained(work.folder, **load).to(work.device)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.actor = self.policy
        if self.mixed:
            self.reference.to(torch.bfloat16)
            self.actor = copy.deepcopy(self.reference)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=work.lr, weight_decay=0.0, fused=True)

    @contextmanager
    def phase(self, name: str):
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.seconds[name] = time.perf_counter() - start

    @torch.no_grad()
    def generate(self, prompts: Tensor) -> Tensor:
        if self.mixed:
            for copied, weight in zip(self.actor.parameters(), self.policy.parameters(), strict=True):
                copied.copy_(weight)
        return responses(self.actor, prompts, self.work.samples, self.work.tokens)

    def step(self, prompts: Tensor, score) -> dict[str, float]:
        work, length = self.work, self.work.tokens
        with self.phase("generate"):
            tokens = self.generate(prompts)
        whole = torch.cat([prompts.repeat_interleave(work.samples, 0), tokens], 1)
        with self.phase("reward"):
            scores = torch.tensor(score(tokens), device=tokens.device)
        with self.phase("reference"), torch.no_grad():
            reference = logprobs(self.reference, whole, length).sum(1)
        with self.phase("update"):
            with torch.autocast(work.device, torch.bfloat16, enabled=self.mixed):
                current = logprobs(self.policy, whole, length).sum(1)
            rewards = (scores - work.beta * (current.detach() - reference)).view(-1, work.samples)
            advantages = (rewards - rewards.mean(1, keepdim=True)) * work.samples / (work.samples - 1)
            (-(advantages.flatten() * current).mean()).backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.seconds | held(work.device) | {"score": float(scores.mean()), "tokens": tokens.numel()}


def main(work: Work) -> None:
    torch.manual_seed(work.seed)
    turns, floor, tokenizer = Turns(waiter(work.device)), Floor(work), tokenizer_of(work)
    texts, found = prompts_of(work), None

    def score(tokens: Tensor) -> list[float]:
        return vader([], tokenizer.batch_decode(tokens, skip_special_tokens=True))

    for step in range(work.steps):
        chosen = [texts[(step * work.prompts + i) % len(texts)] for i in range(work.prompts)]
        prompts = tokenizer(chosen, return_tensors="pt", padding=True, padding_side="left").input_ids.to(work.device)
        turns.next(found)
        found = floor.step(prompts, score)
    turns.next(found)


if __name__ == "__main__":
    main(Work(**json.loads(sys.argv[1])))
