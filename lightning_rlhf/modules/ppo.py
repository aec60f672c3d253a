"""Stage 3: reinforcement learning against the reward, as a contextual bandit (Ouyang et al. 2022, eq. 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add
from pathlib import Path
from time import perf_counter
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core import Algorithm, ConstantSchedule, Curriculum, Schedule
from lightning_rlhf.core.arguments import check_arguments
from lightning_rlhf.core.settings import Difference
from lightning_rlhf.distributed import strategies
from lightning_rlhf.distributed.ranks import Ranks
from lightning_rlhf.engines import Engine, LocalEngine, SamplingParams
from lightning_rlhf.evaluation import Evaluator
from lightning_rlhf.evaluation.evaluation import Evaluation, credited, learned, outcome_of
from lightning_rlhf.evaluation.mean_metrics import MeanMetrics
from lightning_rlhf.models import ModelSource, PolicyModel, ScalarModel
from lightning_rlhf.models.reference import Reference
from lightning_rlhf.models.source import DType
from lightning_rlhf.modules import networks, optim, resume
from lightning_rlhf.modules.compatibility import check_compatible, check_further, further_prompts
from lightning_rlhf.modules.evaluated import EvaluatedModule
from lightning_rlhf.modules.objective import Objective, pretraining_of
from lightning_rlhf.modules.revival import CheckedRevival
from lightning_rlhf.modules.training_signal import TrainingSignal
from lightning_rlhf.rewards import Reward, Scores, as_reward
from lightning_rlhf.rollout import Collector, Episodes, UpdateSchedule
from lightning_rlhf.rollout.clock import Clock, cost
from lightning_rlhf.rollout.responder import Responder
from lightning_rlhf.rollout.scored import ScoredRollout
from lightning_rlhf.rollout.selection import Selection, Step
from lightning_rlhf.types import Experience, Outcome, PPOBatch, PromptBatch, Rollout, TextBatch

DECISIVE = (
    "algorithm",
    "generation",
    "environment",
    "updates",
    "reference_dtype",
    "value_lr",
    "schedule",
    "curriculum",
)
"""Arguments in which a resumed run must agree with its checkpoint."""


class PPOModule(CheckedRevival, EvaluatedModule):  # type: ignore[misc]
    """Reinforcement learning on prompts: one `training_step` is one rollout and its updates.

    Args:
        policy: π_θ at the start: a folder or name, a source, or a causal language model already built.
        reward: a `Reward`, an `nn.Module` on token ids, or a function `fn(prompts, responses, **columns)`.
        algorithm: eq. 2: what is learned from scored responses; None is the contextual bandit, `Algorithm()`. As an
            attribute it has today's β, baseline and surrogate, and the shaping and lengths that were left to the run.
        generation: how responses are drawn, and how many to each prompt.
        updates: inner epochs, minibatches, microbatches, gradient clipping.
        reference: π_SFT of the KL penalty; None is the policy at the start (the adapter off, under PEFT).
        reference_dtype: of the reference's weights where it is a copy of the policy; None is the policy's. In
            `bfloat16` it takes half the memory and less time, and the KL at the start is 0 but for rounding.
        value: V's start, only where the advantage needs one; None is the learned reward model, else the policy's
            backbone with a new head.
        value_lr: peak learning rate of V; None is the policy's.
        tokenizer: of a built policy; otherwise the one beside the weights.
        lr: peak learning rate of AdamW with eps 1e-5 and no weight decay; None is 1e-6, or that of `optimizer`.
        optimizer: a function of the parameter groups (policy first, then value), instead of `lr`.
        schedule: of the learning rates, per rollout.
        compile: fuse the operations of policy and reference by `torch.compile`; sampling is left alone. The first
            rollouts take a minute or more longer.
        evaluations: what validation and test measure beside reward and KL: `WinRate`, `BestOfN`, `GoldReward`, ...
        engine: draws the responses; None is the decode loop of this process.
        curriculum: lets prompts rest that are always or never solved; None draws every prompt.
        environment: answers the policy's turns, so that a response is a dialogue; None takes one turn.

    Attributes:
        iteration: rollouts that were learned from.
        episodes: their responses, of all processes.
        outcome: the responses scored last, in training or evaluation, for callbacks; None after held-out texts.

    Raises:
        ValueError: an argument is out of range, or two of them do not go together.
    """

    def __init__(
        self,
        policy: ModelSource | str | nn.Module,
        reward: Reward | Callable[..., Any],
        algorithm: Algorithm | None = None,
        generation: SamplingParams = SamplingParams(),
        updates: UpdateSchedule = UpdateSchedule(),
        reference: ModelSource | str | None = None,
        reference_dtype: DType | None = None,
        value: ModelSource | str | None = None,
        value_lr: float | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        lr: float | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule = ConstantSchedule(warmup=10),
        compile: bool = False,
        evaluations: Sequence[Evaluator] = (),
        engine: Engine | None = None,
        curriculum: Curriculum | None = None,
        environment: Episodes | None = None,
    ) -> None:
        check_arguments(PPOModule, locals())
        super().__init__()
        models = {"policy": policy, "reference": reference, "value": value}
        self._sources: dict[str, Any] = {name: networks.as_source(model) for name, model in models.items()}
        algorithm = Algorithm() if algorithm is None else algorithm
        self.engine = LocalEngine() if engine is None else engine
        self.generation = generation.for_run(algorithm.advantage.needs_group)
        self.reward = as_reward(reward)
        self.algorithm = algorithm.for_run(
            learned_reward=self.reward.is_learned,
            max_new_tokens=self.generation.max_new_tokens if environment is None else environment.tokens,
            sampled_elsewhere=self.engine.is_external,
        )
        self.environment, self.evaluation = environment, Evaluation(evaluations)
        self.selection = Selection(self.algorithm, curriculum, partial(further_prompts, self))
        self.updates, self.reference_dtype, self.compile_networks = updates, reference_dtype, compile
        check_compatible(self, reference=reference, value=value, value_lr=value_lr)
        resume.keep_hyperparameters(
            self, tokenizer=tokenizer, lr=lr, value_lr=value_lr, reference_dtype=reference_dtype
        )
        self.automatic_optimization = False
        self.tokenizer = networks.find_tokenizer(self._sources["policy"], tokenizer)
        self.optimizer = optim.picklable(optim.chosen_optimizer(optimizer, lr, default=1e-6, eps=1e-5))
        self.value_lr, self.schedule, self.curriculum = value_lr, schedule, curriculum
        self.iteration = self.episodes = 0
        self.policy: PolicyModel = None  # type: ignore[assignment]  # until `configure_model`
        self.value: ScalarModel | None = None
        self.responder: Responder = None  # type: ignore[assignment]  # until `configure_model`
        self.ranks = Ranks(self)
        self.clock, self.signal = Clock(), TrainingSignal()
        self.outcome: Outcome | None = None
        self._changed: list[Difference] = []
        self._ahead: dict[str, Any] = {}
        self._settings = resume.settings(
            self.optimizer,
            **self._sources,
            reward=resume.reward_settings(self.reward),
            **{name: getattr(self, name) for name in DECISIVE},
        )

    @strategies.built_whole
    def configure_model(self) -> None:
        """Build the networks once and shard them if the strategy asks for it.

        Raises:
            ValueError: the strategy cannot train PPO.
        """
        if self.policy:
            return
        optim.refuse_finder(self)
        strategies.check_rl_strategy(self, compiles=self.compile_networks, max_grad_norm=self.updates.max_grad_norm)
        policy, reference, value = self._sources.values()
        self.policy = networks.build_policy(policy, self.tokenizer)
        self.reward.prepare(self.tokenizer)
        if self.algorithm.needs_value:
            self.value = networks.build_value(value, self.reward, policy, self.tokenizer)
        frozen = networks.build_reference(self.policy, reference, self.reference_dtype)
        networks.set_passes(
            self.policy, frozen.frozen, self.value, compiled=self.compile_networks, packed=self.updates.packing
        )
        collector = Collector(
            self.policy,
            frozen,
            self.value,
            self.reward,
            engine=self.engine,
            ranks=self.ranks,
            generation=self.generation,
            updates=self.updates,
            clock=self.clock,
            episodes=None if self.environment is None else (self.environment, self.tokenizer),
            agree=partial(strategies.most_passes, self),
            keeps_graph=not self.algorithm.needs_vocabulary,
        )
        self.responder = Responder(collector=collector, algorithm=self.algorithm, tokenizer=self.tokenizer)
        of_evaluations = self.evaluation.panel.networks(self.tokenizer)
        strategies.shard_networks(self, [self.policy, self.value, *collector.frozen(), *of_evaluations])

    @property
    def collector(self) -> Collector:
        """Sampler and scorer of responses, available after `configure_model`."""
        return self.responder.collector

    @property
    def reference(self) -> Reference:
        """Reference policy π_ref, available after `configure_model`."""
        return self.collector.reference

    @property
    def objective(self) -> Objective:
        """Losses of the policy and the value network."""
        temperature = self.generation.temperature
        return Objective(policy=self.policy, value=self.value, reference=self.reference, temperature=temperature)

    def on_fit_start(self) -> None:
        """Move the frozen networks to the device: Lightning moves only registered submodules."""
        check_further(self, needed=self.selection.needs_further)
        self.collector.to(self.device)

    def on_train_start(self) -> None:
        """Apply what a resumed checkpoint leaves to the run: changed learning rates and the rollout drawn ahead."""
        self.collector.sampler.ahead.restore(self._ahead)
        optim.begin_training(self, self._changed)

    def training_step(self, batch: PPOBatch, batch_idx: int) -> None:
        """Run one rollout and its updates (Ouyang et al. 2022, eq. 2)."""
        start = perf_counter()
        self.clock.lap()  # what validation took is not the step's
        text = pretraining_of(batch, self.algorithm.ptx_coef)

        drawn = self.collect(batch["prompts"], batch.get("next_prompts"))  # y ~ π_old with log-probs (B, R) and r(x, y)
        rollout, scores = drawn.rollout, drawn.scores
        experience = self.credit(rollout, scores).only(drawn.learned)  # Â = r − β·log(π_old/π_ref) − b  (B, T)
        self.outcome = outcome_of(rollout, scores, drawn.prompts, experience)
        metrics = [credited(rollout, scores, experience)]

        with self.clock.phase("update"):
            place = {"rank": self.ranks.rank, "world": self.ranks.world}
            for minibatch, share in self.updates.minibatches(experience, text, seed=self.iteration, **place):
                metrics.append(self.update(minibatch, share))  # surrogate + value loss − γ·log π(text)

        if self.algorithm.surrogate.adaptive:
            with self.clock.phase("kl_old"):
                for piece in self.updates.microbatches(experience, self.collector.agree):
                    metrics.append(self.objective.kl_old(self.algorithm, piece))  # KL(π_old‖π_θ) after the update

        means = reduce(add, metrics).means(self.ranks.sum) | drawn.metrics
        episodes = len(rollout) * self.ranks.world
        self.log_iteration(means, episodes=episodes, seconds=perf_counter() - start)
        self.algorithm = self.algorithm.adapted(means, episodes)  # β, b, baseline, ...
        self.lr_schedulers().step()  # type: ignore[union-attr]

    @property
    def reference_is_policy(self) -> bool:
        """Return True if π_ref is the policy at the start of training."""
        return self._sources["reference"] is None

    @property
    def samples_per_prompt(self) -> int:
        """Number k of responses to each prompt in training."""
        return self.generation.samples_per_prompt or 1

    @property
    def draws_ahead(self) -> bool:
        """Return True if the engine draws the next rollout during the update, for which it needs the next prompts."""
        return self.engine.overlaps

    def collect(self, prompts: PromptBatch, following: PromptBatch | None = None) -> ScoredRollout:
        """Sample and score k responses to each prompt, or to others in its place if the algorithm selects."""
        steps = self.updates.steps(len(prompts.tokens) * self.samples_per_prompt)
        step = Step(
            prompts=prompts,
            samples=self.samples_per_prompt,
            iteration=self.iteration,
            following=None if optim.ends_after(self, steps) else following,
        )
        return self.selection.collect(self.responder, step, self.score)

    def score(self, rollout: Rollout, prompts: PromptBatch) -> Scores:
        """Return r_φ(x, y) after the shaping rules, (B,), in reward units with the unshaped parts."""
        return self.responder.score(rollout, prompts, iteration=self.iteration, algorithm=self.algorithm)

    def credit(self, rollout: Rollout, scores: Scores) -> Experience:
        """Subtract β·KL to the reference from the rewards and estimate the advantages, (B, T)."""
        return self.algorithm.credit(rollout, scores.total, self.ranks.sum, scores.objectives)

    def update(self, minibatch: Experience, text: TextBatch | None) -> MeanMetrics:
        """Take one optimizer step on surrogate + value loss − γ·log π(text), each over its count of all processes."""
        optimizer: Any = self.optimizers()
        actions, words = self.ranks.sum(self.objective.counts(self.algorithm, minibatch, text)).clamp(min=1)
        pieces = self.updates.passes(minibatch, text, self.collector.agree)
        metrics = MeanMetrics()
        optimizer.zero_grad()
        for number, piece in enumerate(pieces, start=1):
            with strategies.one_backward(self, optimizer, last=number == len(pieces)):
                if isinstance(piece, TextBatch):
                    loss, measured = self.objective.text(piece, count=words)
                    loss = self.algorithm.ptx_coef * loss
                else:
                    loss, measured = self.objective.actions(self.algorithm, piece)
                    loss = loss / actions
                self.manual_backward(loss * self.ranks.world)  # strategies average over processes
            metrics += measured
        with self.clock.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()  # or the gradients would take memory until the next rollout is drawn and scored
        return metrics + MeanMetrics.of({"policy/grad_norm": strategies.gradient_norm(self, self._grad_norm)})

    def log_iteration(self, means: dict[str, float], *, episodes: int, seconds: float) -> None:
        """Count the rollout and log what was measured.

        Args:
            means: of all processes, by logged name.
            episodes: responses, of all processes.
            seconds: what the step took.
        """
        self.iteration += 1
        self.episodes += episodes
        self.collector.sampler.outdate(self.iteration)
        stats = learned(means, self.algorithm) | self.engine.metrics()
        tokens = means.get("filter/tokens", means["objective/response_length"] * episodes)
        stats |= cost(self.clock, seconds=seconds, tokens=tokens)
        stats |= {"episode": float(self.episodes), "lr": optim.learning_rate(self)}
        self.signal.look(self.outcome, stats["objective/flat_groups"], self.algorithm)  # type: ignore[arg-type]
        self.log_dict(stats, batch_size=episodes)
        bar = {"score": stats["objective/scores"], "kl": round(stats["objective/kl"], 4) + 0.0}  # no minus zero
        self.log_dict(bar, prog_bar=True, logger=False, batch_size=episodes)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients, which fp16 training has unscaled by now."""
        self._grad_norm = optim.clip_gradients(self, optimizer, self.updates.max_grad_norm)

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """Build one optimizer with a parameter group per trained network and a schedule in rollouts."""
        groups = optim.groups_of(self.policy, self.value, value_lr=self.value_lr)
        return optim.scheduled(self.optimizer(groups), self.schedule, lambda: optim.rollouts_of(self))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the counters and the rollout drawn ahead, with what has adapted or moved."""
        checkpoint["rlhf"] = resume.saved(self, self._settings)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters and the rollout drawn ahead, with what has adapted or moved."""
        self._changed, self._ahead = resume.restored(self, checkpoint, self._settings)

    def teardown(self, stage: str) -> None:
        """Release what the engine holds."""
        self.engine.close()

    def save_pretrained(self, folder: str | Path, *, merge_adapter: bool = False, dtype: DType | None = None) -> None:
        """Write the policy atomically as a Hugging Face folder; `merge_adapter` folds a LoRA adapter in."""
        self.configure_model()
        self.policy.save_pretrained(folder, merge_adapter=merge_adapter, dtype=dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PPOModule:
        super()._apply(fn, recurse)
        if self.responder:
            self.collector.apply(fn)
        return self
