"""Checks before the first update for mistakes that would spoil a run without an error."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.nn.functional import pad

from lightning_rlhf.callbacks.preflight_memory import (
    memory_available,
    memory_estimate,
    memory_report,
    memory_warning,
)
from lightning_rlhf.callbacks.preflight_text import (
    end_report,
    end_warnings,
    template_problems,
    template_warning,
    vocabulary_problems,
)
from lightning_rlhf.types import PromptBatch

logger = logging.getLogger(__name__)

FILTERS: dict[str, tuple[Any, ...]] = {"top_k": (None, 0, 50), "top_p": (None, 1.0), "min_p": (None, 0.0)}
FILTERS |= {"typical_p": (None, 1.0), "repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0)}
FILTERS |= {"min_length": (None, 0), "min_new_tokens": (None, 0), "bad_words_ids": (None, [])}
FILTERS |= {"suppress_tokens": (None, [])}
"""Values of a generation config that change nothing; transformers' own default of top_k is 50."""
SHARDED = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
"""Strategies under which no rollout can be taken between two steps."""
LOW = (torch.bfloat16, torch.float16)
DEMONSTRATION_SCORE = 1.0
"""Largest mean score of demonstrations that counts as near 0, reward units."""


class Preflight(Callback):
    """Rolls out a few prompts before PPO's first update and checks what the mathematics assumes.

    The ratio is 1 and, on a new run whose reference is the policy, the KL to it 0; padding moves nothing; tokenizer and
    embeddings agree; the chat template writes what it is given; where the prompts carry a `response`, those
    demonstrations score near 0 by a learned reward. It logs about how much memory the run takes and which tokens end a
    response, and warns of more memory than there is, of ends that are no special tokens, and of sampling filters in the
    policy's generation config, which this library's sampling leaves out. In the other stages, and under strategies that
    shard, it checks tokenizer and template alone.

    Args:
        prompts: how many are rolled out on each process.
        tolerance: of log-probs, nats per token; None is 1e-3, or 0.5 where training or the reference
            is in low precision.

    Raises:
        ValueError: an argument is too small.
    """

    def __init__(self, prompts: int = 2, tolerance: float | None = None) -> None:
        if prompts < 1 or (tolerance is not None and tolerance < 0):
            raise ValueError(f"`prompts` must be at least 1, `tolerance` at least 0: got {prompts} and {tolerance}")
        self.prompts, self.tolerance = prompts, tolerance
        self._pending = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check tokenizer and template and estimate the memory.

        Raises:
            ValueError: a check failed; all failures are listed, each with what to change.
        """
        self._pending = hasattr(pl_module, "responder") and not isinstance(trainer.strategy, SHARDED)
        tokenizer = getattr(pl_module, "tokenizer", None)
        problems = (
            [] if tokenizer is None else [*vocabulary_problems(pl_module, tokenizer), *template_problems(tokenizer)]
        )
        self._report(trainer, problems)
        if tokenizer is not None:
            for warning in filter(None, [template_warning(tokenizer), *end_warnings(pl_module, tokenizer)]):
                logger.warning(warning)
            logger.info(end_report(pl_module, tokenizer))
        parts = memory_estimate(trainer, pl_module)
        logger.info(memory_report(parts))
        available = memory_available(trainer, pl_module.device)
        short = None if isinstance(trainer.strategy, SHARDED) else memory_warning(parts, available)
        if short is not None:
            logger.warning(short)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check the rollout and the demonstrations of the first batch.

        Raises:
            ValueError: a check failed.
        """
        if not self._pending:
            return
        self._pending = False
        prompts = _first(batch["prompts"], self.prompts)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            problems = [
                *self._rollout_problems(trainer, pl_module, prompts),
                *_demonstration_problems(pl_module, batch),
            ]
        self._report(trainer, problems)
        for name, value in filters(pl_module):
            logger.warning(
                "the policy's generation config has %s=%s: training samples without it, but whoever generates from the "
                "exported model gets it; set it to %s if that is not meant",
                name,
                value,
                FILTERS[name][-1] if name != "top_k" else 0,
            )
        pl_module.clock.lap()

    def _rollout_problems(self, trainer: Trainer, module: Any, prompts: PromptBatch) -> Iterator[str]:
        """Check ratio, KL and padding on one small rollout."""
        collector = module.collector
        rollout = module.responder.respond(prompts, samples=1, stream="preflight", iteration=0)
        temperature = collector.generation.temperature
        now = module.policy.response_logprobs(rollout, temperature=temperature)
        low = collector.policy.computing_dtype(module.device.type) in LOW
        tolerance = self._allowed(low)
        off = float((now - rollout.logprobs).abs().max())
        if not off <= tolerance:
            yield (
                f"the ratio of an untrained policy is not 1: log π_θ and log π_old differ by {off:.3g} nats; set "
                "`updates.old_logprobs` to RecomputedLogprobs(), and see that the network has no dropout and no noise"
            )
        kl = float((rollout.logprobs - rollout.ref_logprobs).abs().max())
        frozen = collector.reference.frozen
        low = low or (frozen is not None and next(frozen.parameters()).dtype in LOW)
        if module.iteration == 0 and module.reference_is_policy and not kl <= self._allowed(low):
            yield (
                f"the KL of an untrained policy to its reference is not 0: their log-probs differ by {kl:.3g} nats; "
                "give both the same weights, dtype and attention kernel, or name another `reference` if that is meant"
            )
        wide = module.policy.response_logprobs(_padded(rollout, columns=3), temperature=temperature)
        moved = float((wide - now).abs().max())
        if not moved <= tolerance:
            yield (
                f"three more columns of padding move log-probs by {moved:.3g} nats: the network reads padding; take "
                "`attention: eager` or `sdpa` in the policy's source, or a network that heeds attention_mask"
            )

    def _allowed(self, low: bool) -> float:
        return self.tolerance if self.tolerance is not None else (0.5 if low else 1e-3)

    @staticmethod
    def _report(trainer: Trainer, problems: list[str]) -> None:
        """Raise on every process if one has a problem."""
        if trainer.strategy.reduce_boolean_decision(not problems):
            return
        listed = "\n".join(f"- {problem}" for problem in problems) or "- on another process, which says more"
        raise ValueError(f"preflight: this run would go wrong\n{listed}\nTo run all the same, take Preflight out.")


def filters(module: Any) -> list[tuple[str, Any]]:
    """Settings of the policy's generation config that would change sampling."""
    config = getattr(module.policy.network, "generation_config", None)
    settings = {name: getattr(config, name, None) for name in FILTERS}
    return [(name, value) for name, value in settings.items() if value not in FILTERS[name]]


def _first(prompts: PromptBatch, count: int) -> PromptBatch:
    return PromptBatch._make(field[:count] for field in prompts)


def _padded(rollout: Any, *, columns: int) -> Any:
    """Pad a rollout on the left by more columns."""
    fill = int(rollout.tokens[0, -1])  # a token of which a network that reads padding would make something
    tokens = pad(rollout.tokens, (columns, 0), value=fill)
    return replace(rollout, tokens=tokens, attention_mask=pad(rollout.attention_mask, (columns, 0)))


def _demonstration_problems(module: Any, batch: Any) -> Iterator[str]:
    """Check that a learned reward scores the demonstrations near 0, where its bias should put them."""
    rows = [row for row in batch["prompts"].rows if isinstance(row.get("response"), str)]
    model = getattr(module.reward, "model", None)
    if not rows or getattr(model, "tokenizer", None) is None:
        return
    scores = module.reward.score([row.get("prompt") for row in rows], [row["response"] for row in rows])
    mean = float(torch.as_tensor(scores).float().mean())
    if not abs(mean) <= DEMONSTRATION_SCORE:
        yield (
            f"{len(rows)} demonstrations score {mean:.3g} on average, not 0: train the reward model with "
            "`data.demonstrations`, so that its bias is set, and export it again"
        )
