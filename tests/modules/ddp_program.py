"""Trains every stage in a folder that holds `lm`, `scorer` and the JSONL files, and gets what came out.

A global batch is the same on any number of processes. `ddp_host` starts them.
"""

from __future__ import annotations

import os
import random
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_rlhf import (
    AlignmentTax,
    BestOfN,
    ComparisonDataModule,
    DemonstrationDataModule,
    EnsembleReward,
    GoldReward,
    LearnedReward,
    ModelSource,
    PPOModule,
    PreferenceModule,
    PromptDataModule,
    Reward,
    RewardModule,
    SamplingParams,
    SFTModule,
    UpdateSchedule,
    WeightedReward,
    WinRate,
)
from lightning_rlhf.callbacks import EMA, Export, MovingReference, RolloutLog, RunCheckpoint, SampleLog
from lightning_rlhf.core import (
    DAPO,
    DPO,
    GAE,
    KTO,
    AdaptiveEntropy,
    AdaptiveKL,
    Algorithm,
    BanditAdvantage,
    BatchStd,
    ConstantSchedule,
    Curriculum,
    DynamicSampling,
    FixedKL,
    GroupAdvantage,
    KLInLoss,
    KLPen,
    LeaveOneOut,
    LinearSchedule,
    MaskTruncated,
    NoScale,
    OnPolicyDistillation,
    RewardToGo,
    RunningMean,
    SeqMeanTokenMean,
    SeqMeanTokenSumNorm,
    SequenceLevel,
    TokenLevel,
    TopEntropy,
    Whitened,
    WorstReward,
)
from lightning_rlhf.environments import Done, Environment, Reply
from lightning_rlhf.models.replica import whole_tensor
from lightning_rlhf.rewards import EnvironmentReward
from lightning_rlhf.rollout import Episodes

COSTS = ("time/", "throughput/", "memory/")  # of this machine, now: no two runs agree
ADAM = partial(torch.optim.Adam, lr=0.01, eps=1e-3)
GLOO = {"process_group_backend": "gloo"}
STRATEGIES = {
    "one": lambda devices: "auto",
    "one32": lambda devices: "auto",
    "ddp": lambda devices: "ddp",
    "failing": lambda devices: "ddp",
    "leaving": lambda devices: "ddp",
    "nodes": lambda devices: "ddp",
    "fsdp2": lambda devices: ModelParallelStrategy(devices, 1, **GLOO),
}
WITHOUT_EMA = ("zero3", "gpu_zero3")
IN_FLOAT32 = ("one32", "fsdp1", "zero2", "zero3")
strategy = "one"  # chosen by `ddp_host`


class Table(Reward):
    """Σ of a number per response token."""

    def __init__(self, roll: int = 7) -> None:
        self.roll = roll

    def __call__(self, rollout, rows):
        tokens = rollout.tokens[:, rollout.prompt_width :]
        numbers = torch.linspace(-1, 1, 36, dtype=torch.float64).roll(self.roll).to(tokens.device)
        return torch.where(rollout.response_mask, numbers[tokens], 0.0).sum(1)


class LastIsEven(Reward):
    """1 where the last token is even, so that many groups score alike."""

    def __call__(self, rollout, rows):
        last = rollout.tokens[:, rollout.prompt_width :].gather(1, rollout.lengths[:, None] - 1).squeeze(1)
        return (last % 2 == 0).double()


class FailsOnOne(Table):
    """Fails on the second process, in the second rollout."""

    def __call__(self, rollout, rows):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2 and torch.distributed.get_rank() == 1:
            raise KeyError("judge")
        return super().__call__(rollout, rows)


class TerminatedOnOne(Callback):
    """The second process is told to leave, in the second rollout."""

    def on_train_batch_start(self, trainer, pl_module, *_):
        if pl_module.iteration == trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Recorder(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, *_):
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.steps.append({name: value for name, value in logged.items() if not name.startswith(COSTS)})


class Passes(Callback):
    """How often the policy ran to learn, by process and rollout, (processes, rollouts)."""

    def __init__(self):
        self.counts = []

    def on_train_start(self, trainer, pl_module):
        pl_module.policy.register_forward_pre_hook(self._count)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.counts.append(0)

    def on_train_end(self, trainer, pl_module):
        self.counts = pl_module.all_gather(torch.tensor(self.counts)).tolist()

    def _count(self, *_):
        self.counts[-1] += torch.is_grad_enabled()


def precision() -> str:
    """Of every network under the strategy."""
    return "float32" if strategy in IN_FLOAT32 else "float64"


def source(folder: Path, name: str, **options) -> ModelSource:
    """A network in the precision of the strategy."""
    return ModelSource(path=str(folder / name), dtype=precision(), **options)


def trainer(devices: int, **options) -> Trainer:
    """A quiet one, with the strategy."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    quiet |= {"enable_checkpointing": False, "max_epochs": 2}
    quiet["plugins"] = None if strategy in IN_FLOAT32 else [DoublePrecision()]  # a plugin: FSDP2 refuses the flag
    return Trainer(
        accelerator="cuda" if strategy.startswith("gpu") else "cpu",
        devices=1 if strategy.endswith("nodes") else devices,
        num_nodes=devices if strategy.endswith("nodes") else 1,
        strategy=STRATEGIES[strategy](devices),
        **(quiet | options),
    )


def run(module, data, devices: int, *, ckpt_path=None, checkpoint=None, **options) -> dict:
    """Fit and validate, from one checkpoint to another where they are named."""
    recorder, callbacks = Recorder(), options.pop("callbacks", [])
    fitter = trainer(devices, callbacks=[recorder, *callbacks], **options)
    fitter.fit(module, data, ckpt_path=ckpt_path)
    if checkpoint is not None:
        fitter.save_checkpoint(checkpoint)
    evaluated = {name: float(value) for name, value in fitter.callback_metrics.items() if name.startswith("eval/")}
    gather = FullyShardedDataParallel.summon_full_params if strategy.endswith("fsdp1") else nullcontext
    with gather(fitter.model):
        weights = torch.cat([whole_tensor(p).flatten().cpu() for p in module.parameters() if p.requires_grad])
    return {"weights": weights, "steps": recorder.steps, "eval": evaluated, "held": held(module)}


def held(module) -> int:
    """Numbers that this process keeps of all networks, frozen ones too."""
    collector = getattr(module, "collector", None)
    networks = [module, *([] if collector is None else collector.frozen())]
    return sum(getattr(p, "ds_tensor", p).numel() for network in networks for p in network.parameters())


def longer(prompts, first, second) -> list[float]:
    """A judge that likes length, and a little what stands first."""
    return [0.6 if len(a) == len(b) else 0.1 + 0.8 * (len(a) > len(b)) for a, b in zip(first, second, strict=True)]


def ppo(folder: Path, devices: int) -> dict:
    """The bandit with PTX, ragged microbatches, both adaptations; every evaluation, one of them by a learned reward."""
    gold = LearnedReward(str(folder / "scorer"), dtype=precision())
    evaluations = [WinRate(samples=2), WinRate(judge=longer, name="judge"), BestOfN(n=(1, 3)), AlignmentTax()]
    module = PPOModule(
        policy=source(folder, "lm"),
        reward=Table(),
        generation=SamplingParams(max_new_tokens=6),
        updates=UpdateSchedule(minibatch=4 // devices, microbatch=3 // devices),
        algorithm=Algorithm(
            beta=AdaptiveKL(coef=0.2, target=0.01, horizon=60.0),
            surrogate=KLPen(coef=1.0, target=1e-3),
            ptx_coef=0.3,
        ),
        optimizer=ADAM,
        schedule=LinearSchedule(),
        evaluations=[*evaluations, GoldReward(reward=gold)],
    )
    data = PromptDataModule(
        train=str(folder / "prompts.jsonl"),
        val=str(folder / "prompts.jsonl"),
        pretrain=str(folder / "texts.jsonl"),
        val_pretrain=str(folder / "texts.jsonl"),
        batch_size=8 // devices,
        pretrain_ratio=1.0,
        text_tokens=8,
    )
    return run(module, data, devices) | {
        "kl": module.algorithm.kl.coef,
        "b": module.algorithm.surrogate.coef,
        "n": module.episodes,
    }


def gae(folder: Path, devices: int) -> dict:
    """Token-level PPO with a value network; two epochs over the whole rollout."""
    module = PPOModule(
        policy=source(folder, "lm"),
        reward=Table(),
        value=source(folder, "scorer"),
        generation=SamplingParams(max_new_tokens=6),
        updates=UpdateSchedule(epochs=2, microbatch=3 // devices),
        algorithm=Algorithm(level=TokenLevel(), advantage=Whitened(estimator=GAE()), beta=FixedKL(coef=0.1)),
        optimizer=ADAM,
        schedule=ConstantSchedule(),
    )
    data = PromptDataModule(train=str(folder / "prompts.jsonl"), batch_size=8 // devices)
    return run(module, data, devices)


KL_IN_LOSS = KLInLoss(level=SequenceLevel())
TOKENS, MEANS = {"level": TokenLevel()}, {"level": TokenLevel(), "reduction": SeqMeanTokenMean()}
GROUPED = {
    "grpo": MEANS | {"advantage": GroupAdvantage()},
    "batch_std": TOKENS | {"advantage": GroupAdvantage(scale=BatchStd()), "reduction": SeqMeanTokenSumNorm(length=8)},
    "dr_grpo": MEANS | {"advantage": GroupAdvantage(scale=NoScale()), "kl_term": KL_IN_LOSS},
    "masked": MEANS | {"advantage": GroupAdvantage(), "masks": [TopEntropy(share=0.4), MaskTruncated()]},
    "rloo": {"advantage": BanditAdvantage(baseline=LeaveOneOut())},
    "reinforce_pp": TOKENS | {"advantage": Whitened(estimator=RewardToGo())},
    "running_mean": {"advantage": BanditAdvantage(baseline=RunningMean(decay=0.5))},
}


def grouped(folder: Path, devices: int) -> dict:
    """Two responses to each prompt, by name of the method; a minibatch holds whole groups on every process."""
    found = {}
    for name, options in GROUPED.items():
        parts = {"long": Table(), "both": EnsembleReward([Table(3), Table(11)], combine=WorstReward())}
        module = PPOModule(
            policy=source(folder, "lm"),
            reward=WeightedReward(parts, weights={"long": 1.0, "both": 0.5}),
            algorithm=Algorithm(beta=AdaptiveKL(coef=0.2, target=0.01, horizon=60.0), shaping=(), **options),
            generation=SamplingParams(max_new_tokens=6, samples_per_prompt=2),
            updates=UpdateSchedule(minibatch=4 // devices, microbatch=3 // devices),
            optimizer=ADAM,
            schedule=ConstantSchedule(),
        )
        data = PromptDataModule(
            train=str(folder / "prompts.jsonl"), val=str(folder / "prompts.jsonl"), batch_size=4 // devices
        )
        logs = [log(str(folder / f"{name}-{strategy}")) for log in (RolloutLog, SampleLog) if name == "rloo"]
        result = run(module, data, devices, max_epochs=1, callbacks=logs)
        found[name] = result | {
            "advantage": module.algorithm.advantage.state(),
            "n": module.episodes,
            "kl": module.algorithm.kl.coef,
        }
    return found


def selected(folder: Path, devices: int) -> dict:
    """Dynamic sampling that refills, and at a cap that is too low; a curriculum."""
    found = {}
    for name, dynamic in {"refilled": DynamicSampling(batches=6), "short": DynamicSampling(batches=1)}.items():
        log = RolloutLog(str(folder / f"selected-{name}-{strategy}"))
        module = PPOModule(
            policy=source(folder, "lm"),
            reward=LastIsEven(),
            algorithm=DAPO(shaping=(), dynamic_sampling=dynamic),
            generation=SamplingParams(max_new_tokens=6, samples_per_prompt=2),
            updates=UpdateSchedule(minibatch=4 // devices, microbatch=3 // devices),
            optimizer=ADAM,
            schedule=ConstantSchedule(),
            curriculum=Curriculum(rest=3),
        )
        data = PromptDataModule(train=str(folder / "prompts.jsonl"), batch_size=4 // devices)
        found[name] = run(module, data, devices, callbacks=[log])
        found[name]["selection"] = module.selection.state()
    return found


def distilled(folder: Path, devices: int) -> dict:
    """The exact KL to a teacher and an entropy bonus: sums over the vocabulary, in microbatches of unequal number."""
    module = PPOModule(
        policy=source(folder, "lm"),
        reference=source(folder, "other"),
        reward=Table(),
        algorithm=OnPolicyDistillation(entropy_bonus=AdaptiveEntropy(coef=0.1, target=100.0, step=0.05)),
        generation=SamplingParams(max_new_tokens=6),
        updates=UpdateSchedule(minibatch=4 // devices, microbatch_tokens=12),
        optimizer=ADAM,
        schedule=ConstantSchedule(),
    )
    data = PromptDataModule(train=str(folder / "prompts.jsonl"), batch_size=8 // devices)
    return run(module, data, devices) | {"bonus": module.algorithm.entropy_bonus.state()}


def lora(folder: Path, devices: int) -> dict:
    """An adapter, whose reference is the policy without it; two responses to each prompt, pieces of unequal number."""
    adapter = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    module = PPOModule(
        policy=source(folder, "lm", peft=adapter),
        reward=LearnedReward(str(folder / "scorer"), dtype=precision()),
        generation=SamplingParams(max_new_tokens=6, samples_per_prompt=2),
        updates=UpdateSchedule(microbatch_tokens=12),
        algorithm=Algorithm(beta=FixedKL(coef=0.1), ptx_coef=0.3),
        optimizer=ADAM,
        schedule=ConstantSchedule(),
        evaluations=[BestOfN(n=(2,)), AlignmentTax()],
    )
    data = PromptDataModule(
        train=str(folder / "prompts.jsonl"),
        val=str(folder / "prompts.jsonl"),
        pretrain=str(folder / "texts.jsonl"),
        val_pretrain=str(folder / "one_text.jsonl"),
        batch_size=4 // devices,
        pretrain_ratio=1.0,
        text_tokens=8,
    )
    export = Export(str(folder / f"lora-{strategy}"), merge_adapter=True)
    passes = Passes()
    return run(module, data, devices, max_epochs=1, callbacks=[export, passes]) | {"passes": passes.counts}


def resumed(folder: Path, devices: int) -> dict:
    """Two epochs of PPO without a stop, and with one."""
    path, found = str(folder / f"{strategy}.ckpt"), {}
    for name, options in {
        "whole": {"max_epochs": 2},
        "first": {"max_epochs": 1, "checkpoint": path},
        "resumed": {"max_epochs": 2, "ckpt_path": path},
    }.items():
        module = PPOModule(
            policy=source(folder, "lm"),
            reward=Table(),
            value=source(folder, "scorer"),
            algorithm=Algorithm(
                advantage=Whitened(estimator=GAE()),
                level=TokenLevel(),
                beta=AdaptiveKL(coef=0.2, target=0.01, horizon=60.0),
            ),
            generation=SamplingParams(max_new_tokens=6),
            optimizer=ADAM,
            schedule=ConstantSchedule(),
        )
        data = PromptDataModule(train=str(folder / "prompts.jsonl"), batch_size=8 // devices)
        ema = EMA(decay=0.5)
        found[name] = run(module, data, devices, callbacks=[] if strategy in WITHOUT_EMA else [ema], **options)
        found[name] |= {"kl": module.algorithm.kl.coef, "n": module.episodes, "average": ema.state_dict()["average"]}
    return found


class Dice(Environment):
    """Answers by the dice, up to three times; now and then it falls off the table."""

    def reset(self, row):
        self.dice, self.turns = random.Random(self.seed), 0
        return self.dice.choice([None, " x", " x y"])

    def step(self, text, tool_calls):
        self.turns += 1
        if self.dice.random() < 0.08:
            raise OSError("the dice fell off the table")
        if self.turns == 3 or self.dice.random() < 0.3:
            return Done(float(len(text) % 3))
        return Reply(self.dice.choice([" v", " v w", " z z z"]), 0.25)


def episodes(folder: Path, devices: int) -> dict:
    """Two epochs of dialogues without a stop, and with one."""
    path, found = str(folder / f"episodes-{strategy}.ckpt"), {}
    for name, options in {
        "whole": {"max_epochs": 2},
        "first": {"max_epochs": 1, "checkpoint": path},
        "resumed": {"max_epochs": 2, "ckpt_path": path},
    }.items():
        module = PPOModule(
            policy=source(folder, "lm"),
            reward=EnvironmentReward(),
            algorithm=Algorithm(advantage=GroupAdvantage(scale=NoScale()), level=TokenLevel(), beta=0.2),
            generation=SamplingParams(max_new_tokens=4, samples_per_prompt=3),
            environment=Episodes(factory=Dice, tokens=20, failures=0.5, patience=30.0),
            optimizer=ADAM,
            schedule=ConstantSchedule(),
        )
        data = PromptDataModule(
            train=str(folder / "prompts.jsonl"), val=str(folder / "prompts.jsonl"), batch_size=4 // devices
        )
        found[name] = run(module, data, devices, **options) | {"n": module.episodes}
    return found


class ReferenceAtStart(Callback):
    """The reference's weights when training starts, and at its end."""

    def on_train_start(self, trainer, pl_module):
        self.start = pl_module.reference.weights()

    def on_train_end(self, trainer, pl_module):
        self.end = pl_module.reference.weights()


def moving(folder: Path, devices: int) -> dict:
    """A reference that moves twice an epoch: without a stop, with one, and from the checkpoint of one process."""
    path, found = str(folder / f"moving-{strategy}.ckpt"), {}
    for name, options in {
        "whole": {"max_epochs": 2},
        "first": {"max_epochs": 1, "checkpoint": path},
        "resumed": {"max_epochs": 2, "ckpt_path": path},
        "from_one": {"max_epochs": 2, "ckpt_path": str(folder / "moving-one.ckpt")},
    }.items():
        module = PPOModule(
            policy=source(folder, "lm"),
            reward=Table(),
            algorithm=Algorithm(beta=0.2),
            generation=SamplingParams(max_new_tokens=6),
            optimizer=ADAM,
            schedule=ConstantSchedule(),
        )
        data = PromptDataModule(
            train=str(folder / "prompts.jsonl"), val=str(folder / "prompts.jsonl"), batch_size=4 // devices
        )
        watch = ReferenceAtStart()
        found[name] = run(module, data, devices, callbacks=[MovingReference(alpha=0.6, every=1), watch], **options)
        found[name] |= {"start": watch.start, "end": watch.end}
    return found


def exporting(folder: Path, name: str) -> list[Callback]:
    """What writes the folder, where it can."""
    return [] if strategy.endswith("fsdp1") else [Export(str(folder / f"{name}-{strategy}"))]


def sft(folder: Path, devices: int) -> dict:
    """Demonstrations of unequal length."""
    module = SFTModule(source(folder, "lm"), optimizer=ADAM)
    path, callbacks = str(folder / "demonstrations.jsonl"), exporting(folder, "sft")
    data = DemonstrationDataModule(train=path, val=path, batch_size=4 // devices)
    return run(module, data, devices, callbacks=callbacks)


def reward(folder: Path, devices: int) -> dict:
    """Rankings of unequal size, and the bias of an odd number of demonstrations."""
    module = RewardModule(source(folder, "scorer"), optimizer=ADAM)
    path = str(folder / "comparisons.jsonl")
    data = ComparisonDataModule(
        train=path, val=path, demonstrations=str(folder / "demonstrations.jsonl"), batch_size=4 // devices
    )
    return run(module, data, devices, callbacks=exporting(folder, "reward")) | {"bias": module.model.bias}


def preference(folder: Path, devices: int) -> dict:
    """DPO on rankings of unequal size."""
    module = PreferenceModule(source(folder, "lm"), DPO(beta=0.5), optimizer=ADAM, schedule=ConstantSchedule())
    path = str(folder / "comparisons.jsonl")
    data = ComparisonDataModule(train=path, val=path, batch_size=4 // devices)
    return run(module, data, devices, callbacks=exporting(folder, "preference"))


class ReferencePasses(Callback):
    """Passes of the reference on this process in every epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if not hasattr(self, "counts"):
            self.counts = []
            pl_module.reference.frozen.register_forward_pre_hook(self._count)
        self.counts.append(0)

    def _count(self, *_):
        self.counts[-1] += 1


def cached(folder: Path, devices: int) -> dict:
    """DPO whose reference is asked once for each text; rows change process from epoch to epoch."""
    module = PreferenceModule(
        source(folder, "lm"), DPO(beta=0.5), source(folder, "other"), optimizer=ADAM, cache_reference=True
    )
    data = ComparisonDataModule(train=str(folder / "comparisons.jsonl"), batch_size=4 // devices)
    passes, root = ReferencePasses(), str(folder / f"cached-{strategy}")
    found = run(module, data, devices, max_epochs=3, callbacks=[passes], default_root_dir=root)
    counts = module.all_gather(torch.tensor(passes.counts)).view(-1, 3).tolist()
    return found | {"passes": counts}


def labels(folder: Path, devices: int, *, val: str = "comparisons", epochs: int = 2) -> dict:
    """KTO on the best and the worst, away from a reference of other weights, so that the KL is above 0."""
    module = PreferenceModule(source(folder, "lm"), KTO(beta=0.5), source(folder, "other"), optimizer=ADAM)
    train, val = (str(folder / f"{name}.jsonl") for name in ("comparisons", val))
    data = ComparisonDataModule(train=train, val=val, batch_size=4 // devices)
    return run(module, data, devices, max_epochs=epochs)


def scarce_labels(folder: Path, devices: int) -> dict:
    """One row to validate on, so that the second process has only a filler."""
    return labels(folder, devices, val="one_comparison", epochs=1)


def scarce(folder: Path, devices: int) -> dict:
    """One comparison and one demonstration to validate on: the second process has only fillers."""
    module = RewardModule(source(folder, "scorer"), optimizer=ADAM)
    data = ComparisonDataModule(
        train=str(folder / "comparisons.jsonl"),
        val=str(folder / "one_comparison.jsonl"),
        demonstrations=str(folder / "one_demonstration.jsonl"),
        batch_size=4 // devices,
    )
    found = run(module, data, devices, max_epochs=1)
    biases = torch.tensor([module.model.bias], dtype=torch.float64)
    return found | {"bias": module.model.bias, "biases": module.all_gather(biases).flatten()}


def scarce_sft(folder: Path, devices: int) -> dict:
    """One demonstration to validate on."""
    module = SFTModule(source(folder, "lm"), optimizer=ADAM)
    data = DemonstrationDataModule(
        train=str(folder / "demonstrations.jsonl"),
        val=str(folder / "one_demonstration.jsonl"),
        batch_size=4 // devices,
    )
    return run(module, data, devices, max_epochs=1)


def scarce_ppo(folder: Path, devices: int) -> dict:
    """One prompt and one text to validate on."""
    module = PPOModule(
        policy=source(folder, "lm"),
        reward=Table(),
        generation=SamplingParams(max_new_tokens=4),
        optimizer=ADAM,
        evaluations=[WinRate(judge=longer, samples=2), BestOfN(n=(2,)), AlignmentTax()],
    )
    data = PromptDataModule(
        train=str(folder / "prompts.jsonl"),
        val=str(folder / "one_prompt.jsonl"),
        val_pretrain=str(folder / "one_text.jsonl"),
        text_tokens=4,
        batch_size=4 // devices,
    )
    return run(module, data, devices, max_epochs=1)


def failing(folder: Path, devices: int) -> dict:
    """PPO whose reward fails on one process; the folder of failed rewards is its own."""
    os.chdir(folder)
    module = PPOModule(source(folder, "lm"), FailsOnOne(), generation=SamplingParams(max_new_tokens=2), optimizer=ADAM)
    return run(module, PromptDataModule(train=str(folder / "prompts.jsonl"), batch_size=4 // devices), devices)


def leaving(folder: Path, devices: int) -> dict:
    """PPO of which one process is told to leave."""
    module = PPOModule(source(folder, "lm"), Table(), generation=SamplingParams(max_new_tokens=2), optimizer=ADAM)
    data = PromptDataModule(train=str(folder / "prompts.jsonl"), batch_size=4 // devices)
    saver = RunCheckpoint(str(folder / "leaving"), every_n_batches=99)
    return run(module, data, devices, callbacks=[TerminatedOnOne(), saver], enable_checkpointing=True)
