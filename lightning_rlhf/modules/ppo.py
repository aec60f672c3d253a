"""Stage 3: reinforcement learning against the reward, as a contextual bandit (Ouyang et al. 2022, eq. 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core import (
    ActionLevel,
    AdvantageEstimator,
    BanditAdvantage,
    Clip,
    ClippedValueLoss,
    Constant,
    FixedKL,
    KLController,
    KLInReward,
    Reduction,
    ReferenceKL,
    Schedule,
    SequenceLevel,
    Shaping,
    Surrogate,
    TokenMean,
    ValueLoss,
)
from lightning_rlhf.core.settings import Difference
from lightning_rlhf.models import ModelSource, PolicyModel, ScalarModel
from lightning_rlhf.models.limits import check_length
from lightning_rlhf.models.source import DType
from lightning_rlhf.modules import resume
from lightning_rlhf.modules.combinations import check_groups, check_level, check_shaping, check_value, shaping_of
from lightning_rlhf.modules.credit import credit
from lightning_rlhf.modules.evaluation import Evaluation, Evaluator, outcome_of
from lightning_rlhf.modules.hparams import keep_hyperparameters
from lightning_rlhf.modules.networks import build_policy, build_reference, build_value, find_tokenizer
from lightning_rlhf.modules.objective import Objective, pretraining_of
from lightning_rlhf.modules.optim import clip_gradients, global_sum, rollouts_of, scheduled, trainable
from lightning_rlhf.modules.optimizer_checks import begin_training, picklable
from lightning_rlhf.modules.revival import CheckedRevival
from lightning_rlhf.modules.sharding import built_whole, most_passes, shard_networks
from lightning_rlhf.modules.strategies import check_rl_strategy, gradient_norm, one_backward
from lightning_rlhf.modules.tally import Tally
from lightning_rlhf.modules.training_signal import TrainingSignal
from lightning_rlhf.rollout import Collector, Generation, OldLogprobs, Reward, Scores, Updates, as_reward
from lightning_rlhf.rollout.clock import Clock, cost
from lightning_rlhf.rollout.failure import scored_or_told
from lightning_rlhf.types import Experience, Outcome, PPOBatch, PromptBatch, Rollout, TextBatch

ADAPTIVE = ("kl", "surrogate", "advantage")
"""Arguments of which numbers move, so that checkpoints carry them."""
DECISIVE = ("generation", "updates", "old_logprobs", "level", *ADAPTIVE, "kl_term", "value_loss", "reduction")
DECISIVE += ("shaping", "ptx_coef", "reference_dtype", "value_lr", "schedule")
"""Arguments in which a resumed run must agree with its checkpoint."""


class PPOModule(CheckedRevival, LightningModule):
    """PPO, or PPO-ptx with `ptx_coef` > 0, on prompts; one `training_step` is one rollout and its updates.

    Args:
        policy: π_θ at the start, as a source or a causal language model already built.
        reward: a `Reward`, an `nn.Module` on token ids, or a function `fn(prompts, responses, **columns)`.
        reference: π_SFT of the KL penalty; None is the policy at the start (the adapter off, under PEFT).
        reference_dtype: of the reference's weights where it is a copy of the policy; None is the policy's. In
            `bfloat16` it takes half the memory and less time, and the KL at the start is 0 but for rounding.
        value: V's start, only where the advantage needs one; None is the learned reward model, else the policy's
            backbone with a new head.
        tokenizer: of a built policy; otherwise the one beside the weights.
        generation: how responses are drawn, and how many to each prompt.
        updates: inner epochs, minibatches, microbatches, gradient clipping.
        old_logprobs: where the ratio's log π_old comes from; None takes the cheapest that is exact, and logs which.
        level: what an action is: the whole response (the bandit) or a token.
        kl: β and how it adapts.
        kl_term: whether the KL to the reference is charged in the reward or in the loss.
        advantage: how rewards become advantages; the default is r − β·log(π/π_SFT) with no baseline.
        surrogate: how far an update follows them.
        value_loss: of V; None is `ClippedValueLoss()` where the advantage needs a value network.
        reduction: from per-action losses to a number.
        shaping: rules on the score, applied in turn. None: the score of a learned reward, whose demonstrations lie
            around 0, becomes −1 where a response hit the length limit; that of any other reward stays as it is.
        ptx_coef: γ ≥ 0, weight of the pretraining loss; above 0 the data must serve a pretraining stream.
        compile: fuse the operations of policy and reference by `torch.compile`; sampling is left alone. The first
            rollouts take a minute or more longer.
        optimizer: a function of the parameter groups (policy first, then value).
        value_lr: peak learning rate of V; None is the policy's.
        schedule: of the learning rates, per rollout.
        evaluations: what validation and test measure beside reward and KL: `WinRate`, `BestOfN`, `GoldReward`, ...

    Attributes:
        iteration: rollouts that were learned from.
        episodes: their responses, of all processes.
        outcome: the responses scored last, in training or evaluation, for callbacks; None after held-out texts.

    Raises:
        ValueError: an argument is out of range, or two of them do not go together (see `combinations`).
    """

    def __init__(
        self,
        policy: ModelSource | nn.Module,
        reward: Reward | Callable[..., Any],
        reference: ModelSource | None = None,
        reference_dtype: DType | None = None,
        value: ModelSource | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        generation: Generation = Generation(),
        updates: Updates = Updates(),
        old_logprobs: OldLogprobs | None = None,
        level: ActionLevel = SequenceLevel(),
        kl: KLController = FixedKL(),
        kl_term: ReferenceKL = KLInReward(),
        advantage: AdvantageEstimator = BanditAdvantage(),
        surrogate: Surrogate = Clip(),
        value_loss: ValueLoss | None = None,
        reduction: Reduction = TokenMean(),
        shaping: Sequence[Shaping] | None = None,
        ptx_coef: float = 0.0,
        compile: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, eps=1e-5, weight_decay=0.0),
        value_lr: float | None = None,
        schedule: Schedule = Constant(warmup=10),
        evaluations: Sequence[Evaluator] = (),
    ) -> None:
        super().__init__()
        if ptx_coef < 0:
            raise ValueError(f"`ptx_coef` must be at least 0: got {ptx_coef}")
        check_value(advantage, value=value, value_lr=value_lr, value_loss=value_loss)
        check_groups(advantage, generation)
        check_level(level, surrogate)
        keep_hyperparameters(
            self, tokenizer=tokenizer, ptx_coef=ptx_coef, value_lr=value_lr, reference_dtype=reference_dtype
        )
        self.automatic_optimization = False
        self.tokenizer = find_tokenizer(policy, tokenizer)
        self.generation, self.updates, self.old_logprobs, self.level = generation, updates, old_logprobs, level
        self.kl, self.kl_term, self.advantage = kl, kl_term, advantage
        self.surrogate, self.reduction, self.value_loss = surrogate, reduction, value_loss or ClippedValueLoss()
        self.reward, self.ptx_coef = as_reward(reward), ptx_coef
        self.shaping = shaping_of(self.reward) if shaping is None else tuple(shaping)
        check_shaping(self.shaping, generation)
        self.reference_dtype, self.compile_networks = reference_dtype, compile
        self.optimizer, self.value_lr, self.schedule = picklable(optimizer), value_lr, schedule
        self.iteration = self.episodes = 0
        self.policy: PolicyModel | None = None
        self.value: ScalarModel | None = None
        self.collector: Collector | None = None
        self.evaluation, self.clock, self.signal = Evaluation(self, evaluations), Clock(), TrainingSignal()
        self.outcome: Outcome | None = None
        self._changed: list[Difference] = []
        self._sources = (policy, reference, value)
        decisive = {name: getattr(self, name) for name in DECISIVE} | {"reward": resume.reward_settings(self.reward)}
        self._settings = resume.settings(optimizer, policy=policy, reference=reference, value=value, **decisive)

    @built_whole
    def configure_model(self) -> None:
        """Build policy, reference, reward and value network, once; shard them where the strategy asks.

        Raises:
            ValueError: the strategy cannot train PPO.
        """
        if self.policy is not None:
            return
        check_rl_strategy(self)
        policy, reference, value = self._sources
        self.policy = build_policy(policy, self.tokenizer)
        self.reward.prepare(self.tokenizer)
        if self.advantage.needs_value:
            self.value = build_value(value, self.reward, policy, self.tokenizer)
        frozen = build_reference(self.policy, reference, self.reference_dtype)
        for model in filter(None, [self.policy, frozen] if self.compile_networks else []):
            model.compile_backbone()
        self.collector = Collector(
            self.policy,
            frozen,
            self.value,
            self.reward,
            generation=self.generation,
            updates=self.updates,
            old_logprobs=self.old_logprobs,
            clock=self.clock,
            agree=partial(most_passes, self),
        )
        shard_networks(self, [self.policy, self.value, *self.collector.frozen(), *self.evaluation.panel.networks()])

    def on_fit_start(self) -> None:
        """Bring the frozen networks, which strategies do not see, to the process's device."""
        self.collector.to(self.device)

    def on_train_start(self) -> None:
        """Take learning rates that a resumed run has otherwise than its checkpoint."""
        begin_training(self, self._changed)

    def training_step(self, batch: PPOBatch, batch_idx: int) -> None:
        """Roll out, score, credit, update (Ouyang et al. 2022, eq. 2)."""
        tally, prompts, text, start = Tally(), batch["prompts"], pretraining_of(batch, self.ptx_coef), perf_counter()
        self.clock.lap()  # what validation took is not the step's
        rollout = self.roll_out(prompts, self.samples_per_prompt, stream="train", iteration=self.iteration)  # y ~ π_old
        scores = self.score(rollout, prompts)  # r_φ(x, y)                                        (B,)
        experience = self.credit(rollout, scores, tally)  # Â = r − β·log(π_old/π_ref) − b          (B, T)
        self.outcome = outcome_of(rollout, scores, prompts, experience)

        with self.clock.phase("update"):
            place = {"rank": self.global_rank, "world": self.trainer.world_size}
            for minibatch, share in self.updates.minibatches(experience, text, seed=self.iteration, **place):
                self.update(minibatch, share, tally)  # surrogate + value loss − γ·log π(text)

        if self.surrogate.adaptive:
            with self.clock.phase("kl_old"):
                for piece in self.updates.microbatches(experience, self.collector.agree):
                    self.objective.kl_old(piece, tally)  # KL(π_old‖π_θ) after the update
        self.conclude(tally, episodes=len(rollout) * self.trainer.world_size, seconds=perf_counter() - start)

    @property
    def reference_is_policy(self) -> bool:
        """Whether π_ref is the policy at the start."""
        return self._sources[1] is None

    @property
    def samples_per_prompt(self) -> int:
        """k, responses to each prompt in training."""
        return self.generation.samples_per_prompt

    def roll_out(self, prompts: PromptBatch, samples: int, *, stream: str, iteration: int) -> Rollout:
        """`samples` responses of the policy to each prompt, drawn with the random numbers of (stream, iteration)."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        longest = prompts.tokens.shape[1] + self.generation.max_new_tokens
        check_length(self.policy.network, longest, limits="the data's `max_prompt_tokens` or `max_new_tokens`")
        return self.collector(prompts, samples=samples, stream=stream, iteration=iteration, rank=rank, world=world)

    @torch.no_grad()
    def score(self, rollout: Rollout, prompts: PromptBatch) -> Scores:
        """r_φ(x, y) after the shaping rules, (B,), reward units, with the parts of the reward before them."""
        with self.clock.phase("reward"):
            rows = [prompts.rows[i] for i in rollout.groups.tolist()]
            scores, parts, _ = scored_or_told(self.reward, rollout, rows, agreed=self.agreed, iteration=self.iteration)
        shaped = raw = scores.detach().to(rollout.logprobs)
        for rule in self.shaping:
            shaped = rule(shaped, lengths=rollout.lengths, ended=rollout.ended)
        return Scores(shaped, parts, raw)

    credit = credit  # rewards less β·KL to the reference, and the advantages they give

    def update(self, minibatch: Experience, text: TextBatch | None, tally: Tally) -> None:
        """One optimizer step on surrogate + value loss − γ·log π(text), each over its count of all processes."""
        optimizer = self.optimizers()
        counts = [self.reduction.count(minibatch.mask), 0 * minibatch.mask.sum() if text is None else text.target.sum()]
        actions, words = self.all_sum(torch.stack(counts)).clamp(min=1)
        pieces = self.updates.passes(minibatch, text, self.collector.agree)
        optimizer.zero_grad()
        for number, piece in enumerate(pieces, start=1):
            with one_backward(self, optimizer, last=number == len(pieces)):
                loss = self.objective.of_piece(piece, tally, actions=actions, words=words, ptx_coef=self.ptx_coef)
                self.manual_backward(loss * self.trainer.world_size)  # strategies average over processes
        with self.clock.phase("optimizer"):
            optimizer.step()
        tally.add("policy/grad_norm", gradient_norm(self, self._grad_norm))

    @property
    def objective(self) -> Objective:
        """The loss with today's surrogate and β."""
        return Objective.of(self)

    def conclude(self, tally: Tally, *, episodes: int, seconds: float) -> None:
        """Log the iteration, adapt β and the surrogate, step the schedule."""
        stats = tally.means(self.all_sum)
        stats |= cost(self.clock, seconds=seconds, tokens=stats["objective/response_length"] * episodes)
        stats["val/ratio_var"] = max(stats.pop("val/ratio_square") - stats["val/ratio"] ** 2, 0.0)
        self.iteration, self.episodes = self.iteration + 1, self.episodes + episodes
        rate = self.optimizers().param_groups[0]["lr"]
        stats |= {"objective/kl_coef": self.kl.coef, "episode": float(self.episodes), "lr": rate}
        stats |= {f"surrogate/{name}": number for name, number in self.surrogate.state().items()}
        self.signal.look(self.outcome, flat_groups=stats["objective/flat_groups"])
        self.log_dict(stats, batch_size=episodes)
        bar = {"score": stats["objective/scores"], "kl": stats["objective/kl"]}
        self.log_dict(bar, prog_bar=True, logger=False, batch_size=episodes)
        self.kl = self.kl.adapted(stats["objective/kl"], episodes)
        self.advantage = self.advantage.adapted(stats["objective/rlhf_reward"])
        self.surrogate = self.surrogate.adapted(stats["policy/kl_old"]) if self.surrogate.adaptive else self.surrogate
        self.lr_schedulers().step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip: here the gradients of fp16 are unscaled."""
        self._grad_norm = clip_gradients(self, optimizer, self.updates.max_grad_norm)

    def on_validation_epoch_start(self) -> None:
        """Begin a new mean."""
        self.evaluation.begin()

    def validation_step(self, batch: PromptBatch | TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Generate on held-out prompts and score; or measure the held-out pretraining loss."""
        self.evaluation.step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log `eval/…`."""
        self.evaluation.log("eval")

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def on_test_epoch_end(self) -> None:
        """Log `test/…`."""
        self.evaluation.log("test")

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Each prompt's response with its score, KL and length, as JSON-ready records."""
        return self.evaluation.predict(batch, batch_idx)

    def configure_optimizers(self) -> dict[str, Any]:
        """One optimizer, a parameter group for each trained network; the schedule steps once per rollout."""
        groups: list[dict[str, Any]] = [{"params": trainable(self.policy)}]
        if self.value is not None:
            groups.append({"params": trainable(self.value)} | ({} if self.value_lr is None else {"lr": self.value_lr}))
        return scheduled(self.optimizer(groups), self.schedule, lambda: rollouts_of(self))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counters, β, and what moves in surrogate and advantage, as Python numbers."""
        counters = {"iteration": self.iteration, "episodes": self.episodes, "version": resume.version()}
        counters["settings"] = resume.of_all_processes(self._settings, self._trainer)
        checkpoint["rlhf"] = counters | {name: getattr(self, name).state() for name in ADAPTIVE}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue from what `on_save_checkpoint` kept."""
        self._changed = resume.check_resumable(self, checkpoint, resume.of_all_processes(self._settings, self._trainer))
        state = resume.with_changes(checkpoint["rlhf"], self._changed)
        self.iteration, self.episodes = state["iteration"], state["episodes"]
        for name in ADAPTIVE:
            setattr(self, name, getattr(self, name).restored(state[name]))

    def save_pretrained(self, folder: str | Path, *, merge_adapter: bool = False, dtype: DType | None = None) -> None:
        """Write the policy as a Hugging Face folder, whole or not at all; `merge_adapter` folds a LoRA adapter in."""
        self.configure_model()
        self.policy.save_pretrained(folder, merge_adapter=merge_adapter, dtype=dtype)

    def all_sum(self, x: Tensor) -> Tensor:
        """Σ over all processes."""
        return global_sum(self, x)

    def agreed(self, decision: bool) -> bool:
        """Whether all processes say yes."""
        return not self.all_sum(torch.tensor(float(not decision), device=self.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PPOModule:
        super()._apply(fn, recurse)
        if self.collector is not None:
            self.collector.apply(fn)
        return self
