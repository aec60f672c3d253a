"""Switches of the stages and of what surrounds them: short runs on tiny networks, and what they leave behind."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gathered import gathered
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from peft import LoraConfig
from switch_bench import Bench
from switch_episodes import Talk
from switch_harness import Observer, Table, case, to
from switch_rewards import letters, words
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_rlhf.callbacks import (
    EMA,
    Export,
    GradientNorms,
    KLGuard,
    MovingReference,
    NonFiniteGuard,
    PredictionWriter,
    Preflight,
    RaiseKL,
    Report,
    RollBack,
    RolloutLog,
    RolloutProgress,
    RunCheckpoint,
    SampleLog,
)
from lightning_rlhf.core import (
    GAE,
    IPO,
    Algorithm,
    BanditAdvantage,
    BatchMean,
    ClippedValueLoss,
    ConstantSchedule,
    Curriculum,
    DynamicSampling,
    EntropyBonus,
    FixedKL,
    ImportanceSampling,
    KLInLoss,
    PlackettLuce,
    SeqMeanTokenMean,
    TokenLevel,
    TopEntropy,
    TruncatedScore,
)
from lightning_rlhf.data import ComparisonDataModule, DemonstrationDataModule
from lightning_rlhf.engines import LocalEngine, Request, Sampled, SamplingParams
from lightning_rlhf.evaluation import AlignmentTax, BestOfN, GoldReward, MajorityAtK, PassAtK, WinRate
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import PPOModule, PreferenceModule, RewardModule, SFTModule
from lightning_rlhf.rollout import Episodes, RecomputedLogprobs, UpdateSchedule
from lightning_rlhf.rollout.pass_rates import PassRates

SGD, SLOW = (partial(torch.optim.SGD, lr=lr) for lr in (0.05, 0.01))
COSTS = ("time", "throughput", "memory")  # no two runs agree on them
FREE = UpdateSchedule(max_grad_norm=None)  # a clipped gradient would hide a factor on the loss
GROUPS = {"generation": SamplingParams(max_new_tokens=5, samples_per_prompt=2)}
MANY = UpdateSchedule(epochs=3, max_grad_norm=None)  # ratios leave 1


class Greedy(LocalEngine):
    """An engine of a user's own: the most likely token, whatever was asked for."""

    def generate(self, request: Request) -> Sampled:
        return super().generate(replace(request, uniforms=None))


def shorter(prompts: list[Any], first: list[str], second: list[str]) -> list[float]:
    """A judge."""
    return [0.2 + 0.7 * (len(a) < len(b)) for a, b in zip(first, second, strict=True)]


def same(prompts: list[Any], responses: list[str]) -> list[float]:
    """A reward that tells no response from another."""
    return [0.5] * len(responses)


def some(prompts: list[Any], responses: list[str]) -> list[float]:
    """A reward under which some groups of two are flat."""
    return [float(response[-1:] in "abcdefghijklm") for response in responses]


def table(bench: Bench) -> Table:
    return _rl(bench) | _supervised(bench) | _around(bench)


def _rl(bench: Bench) -> Table:
    """Two rollouts, for at the first the policy is still its own reference."""
    usual = {"policy": bench.policy, "reward": letters, "tokenizer": bench.tokenizer, "optimizer": SGD}
    usual |= {"generation": SamplingParams(max_new_tokens=5, seed=1), "updates": FREE, "schedule": ConstantSchedule()}
    source, other = (ModelSource(path=bench.folder(network)) for network in (bench.policy, bench.other_policy))
    of_tokens = {"advantage": GAE(), "level": TokenLevel()}
    critic = {"policy": source, "algorithm": Algorithm(**of_tokens)}

    def fitted(module: PPOModule) -> PPOModule:
        batch = {"prompts": bench.prompts, "pretrain": bench.texts}
        bench.trainer().fit(module, _loader(batch, batch))
        return module

    def weights(module: PPOModule) -> list[Tensor]:
        return list(fitted(module).policy.parameters())

    def value_weights(module: PPOModule) -> list[Tensor]:
        return list(fitted(module).value.parameters())

    def logged(module: PPOModule) -> dict[str, Tensor]:
        logged = fitted(module).trainer.callback_metrics
        return {name: value for name, value in logged.items() if name.split("/")[0] not in COSTS}

    def sequences_per_pass(module: PPOModule) -> list[int]:
        module.configure_model()
        sizes: list[int] = []
        module.policy.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        fitted(module)
        return sizes

    def tokens_per_pass(module: PPOModule) -> list[int]:
        module.configure_model()
        sizes: list[int] = []
        table = module.policy.network.get_input_embeddings()
        table.register_forward_hook(lambda _, __, states: sizes.append(states.shape[:-1].numel()))
        fitted(module)
        return sizes

    def rows_per_token(module: PPOModule) -> list[int]:
        module.configure_model()
        sizes: list[int] = []

        def note(_: Any, __: Any, inputs: dict[str, Tensor]) -> None:
            if inputs["input_ids"].shape[1] == 1:
                sizes.append(len(inputs["input_ids"]))

        module.policy.network.register_forward_pre_hook(note, with_kwargs=True)
        fitted(module)
        return sizes

    def kinds_of_reference(module: PPOModule) -> list[str]:
        module.configure_model()
        return [str(weight.dtype) for weight in module.collector.reference.frozen.parameters()]

    def compiled(module: PPOModule) -> int:
        """Networks handed to torch's compiler, which takes too long to run here."""
        with mock.patch.object(torch.nn.Module, "compile") as asked:
            module.configure_model()
        return asked.call_count

    def inside(argument: str) -> Callable[[Observer], Observer]:
        """From an observer of the module to one of a setting of it."""

        def of_setting(observe: Observer) -> Observer:
            return wraps(observe)(
                lambda setting: observe(PPOModule(**gathered(**copy.deepcopy(usual) | {argument: setting})))
            )

        return of_setting

    def through(observe: Observer, **more: Any) -> Observer:
        """From an observer of the module to one of its algorithm."""
        return wraps(observe)(
            lambda algorithm: observe(PPOModule(**copy.deepcopy(usual | more) | {"algorithm": algorithm}))
        )

    def chosen(dynamic: DynamicSampling) -> list[Any]:
        """What a rollout without different scores is filled with."""
        module = PPOModule(
            **usual | {"generation": SamplingParams(max_new_tokens=5, samples_per_prompt=2), "reward": same},
            algorithm=Algorithm(dynamic_sampling=dynamic),
        )
        module.selection.further = lambda number: bench.prompts
        module.configure_model()
        drawn = module.collect(bench.prompts)
        return [drawn.metrics["filter/batches"], drawn.learned]

    def resting(module: PPOModule) -> dict[str, float]:
        """How a rollout was drawn."""
        module.selection.further = lambda number: bench.prompts
        module.configure_model()
        return module.collect(bench.prompts).metrics

    def rests(curriculum: Curriculum) -> list[bool]:
        """In which rollouts a prompt may be drawn again, whatever its pass rates."""
        rates = PassRates(curriculum)
        for prompt, shares in enumerate([(1, 1), (0, 0), (0, 1), (0.5, 1), (1, 0.75), (0.25, 0.25)]):
            for rollout, share in enumerate(shares):
                scores = torch.tensor([1.0] * round(4 * share) + [0.6] * round(2 * (1 - share)) + [0.0] * 2)
                rates.note(prompt, scores[:4], rollout)
        return [rates.awake(prompt, rollout) for prompt in range(6) for rollout in range(40)]

    def evaluated(module: PPOModule) -> dict[str, float]:
        """Everything that a validation logs."""
        found = bench.trainer().validate(module, [_loader(bench.prompts), _loader(bench.texts)], verbose=False)
        return {name: value for part in found for name, value in part.items()}

    def beside(evaluation: Any) -> dict[str, float]:
        return evaluated(PPOModule(**gathered(**copy.deepcopy(usual) | {"evaluations": [evaluation]})))

    generation, updates = inside("generation"), inside("updates")
    return {
        AlignmentTax: case(beside),
        Curriculum: case(rests, solved=to(0.5), decay=to(0.0), low=to(0.3), high=to(0.8), rest=to(3)),
        DynamicSampling: case(chosen, batches=to(2), keep_flat=to(True)),
        BestOfN: case(beside, {"n": (1, 2)}, n=to((3,))),
        PassAtK: case(beside, {"solved": 4.0}, k=to((2,)), samples=to(6), solved=to(3.0), name=to("solved_in")),
        MajorityAtK: case(
            beside,
            {"k": (3,), "solved": 8.0, "extract": "([a-z])"},
            k=to((2,)),
            samples=to(6),
            solved=to(4.0),
            extract=to("(#)"),
            name=to("voted"),
        ),
        GoldReward: case(beside, {"reward": words}, reward=to(letters), name=to("silver")),
        WinRate: case(beside, judge=to(shorter), samples=to(2), name=to("wins")),
        SamplingParams: case(
            generation(weights),
            {"max_new_tokens": 5},
            max_new_tokens=to(3),
            samples_per_prompt=to(2),
            slots=to(2, by=generation(rows_per_token)),  # it changes the passes, never the result
            temperature=to(0.7),
            dtype=to("bfloat16", by=generation(logged)),
            seed=to(1),
        ),
        Algorithm: case(
            through(weights),
            level=to(TokenLevel()),
            beta=to(0.5),
            kl_term=to(KLInLoss(), by=through(weights, updates=MANY)),  # at ratio 1 it is the reward's
            advantage=to(BanditAdvantage(baseline=BatchMean())),
            surrogate=to(ImportanceSampling(), by=through(weights, updates=MANY)),
            value_loss=to(ClippedValueLoss(coef=1.0), by=through(value_weights, policy=source), **of_tokens),
            reduction=to(SeqMeanTokenMean(), level=TokenLevel()),
            shaping=to(TruncatedScore()),
            masks=to(TopEntropy(), level=TokenLevel()),
            entropy_bonus=to(EntropyBonus(coef=1.0)),
            dynamic_sampling=to(DynamicSampling(batches=1), by=through(weights, **GROUPS, reward=some)),
            ptx_coef=to(0.5),
        ),
        PPOModule: case(
            weights,
            usual,
            policy=to(bench.other_policy),
            reward=to(words),
            reference=to(other),
            reference_dtype=to("bfloat16", by=kinds_of_reference),
            value=to(other, **critic),
            tokenizer=to(bench.other_tokenizer),
            generation=to(SamplingParams(max_new_tokens=3)),
            updates=to(MANY),
            algorithm=to(Algorithm(level=TokenLevel())),
            compile=to(True, by=compiled),
            lr=to(0.01, optimizer=None),
            optimizer=to(SLOW),
            value_lr=to(0.5, by=value_weights, **critic),
            schedule=to(ConstantSchedule(warmup=10)),
            evaluations=to([WinRate()], by=evaluated),
            engine=to(Greedy()),
            curriculum=to(Curriculum(), by=resting),
            environment=to(Episodes(factory=Talk, tokens=20)),
        ),
        UpdateSchedule: case(
            updates(weights),
            epochs=to(2),
            minibatch=to(2),
            microbatch=to(2, by=updates(sequences_per_pass)),  # it changes memory, never the result
            microbatch_tokens=to(20, by=updates(sequences_per_pass)),
            packing=to(True, by=updates(tokens_per_pass)),
            max_grad_norm=to(0.01),
            old_logprobs=to(
                RecomputedLogprobs(), by=updates(sequences_per_pass)
            ),  # they are equal, but one is computed
        ),
    }


def _supervised(bench: Bench) -> Table:
    """Two steps on data that take their tokenizer from the module."""
    usual = {"tokenizer": bench.tokenizer, "optimizer": SGD}
    demonstrations = {"train": bench.file("demonstrations"), "batch_size": 2}
    rankings = {"train": bench.file("rankings"), "batch_size": 2}

    def weights(module: SFTModule | RewardModule | PreferenceModule) -> list[Tensor]:
        sft = isinstance(module, SFTModule)
        data = DemonstrationDataModule(**demonstrations) if sft else ComparisonDataModule(**rankings)
        bench.trainer().fit(module, datamodule=data)
        return list(module.model.parameters())

    def cached(module: PreferenceModule) -> bool:
        folder = bench.empty()
        trainer = bench.trainer(default_root_dir=folder)
        trainer.fit(module, datamodule=ComparisonDataModule(**rankings))
        return any(folder.rglob("logprobs.safetensors"))

    shared = {
        "tokenizer": to(bench.other_tokenizer),
        "optimizer": to(SLOW),
        "lr": to(0.01, optimizer=None),
        "schedule": to(ConstantSchedule()),
    }
    source = ModelSource(path=bench.folder(bench.other_policy))
    return {
        PreferenceModule: case(
            weights,
            usual | {"policy": bench.policy},
            policy=to(bench.other_policy),
            loss=to(IPO()),
            reference=to(source),
            cache_reference=to(True, by=cached),
            **shared,
        ),
        RewardModule: case(
            weights,
            usual | {"model": bench.scorer},
            model=to(bench.other_scorer),
            loss=to(PlackettLuce()),
            **shared,
        ),
        SFTModule: case(
            weights,
            usual | {"model": bench.policy},
            model=to(bench.other_policy),
            **shared,
        ),
    }


def _around(bench: Bench) -> Table:
    """Callbacks, in a current folder of their own, which paths are relative to."""
    adapted = ModelSource(path=bench.folder(bench.policy), peft=LoraConfig(r=2, target_modules=["c_attn"]))

    def fitted(callback: Callback, model: Any) -> LightningModule:
        module = SFTModule(copy.deepcopy(model), bench.tokenizer, optimizer=SGD, schedule=ConstantSchedule())
        bench.trainer([callback]).fit(module, _loader(bench.texts, bench.texts), _loader(bench.texts))
        return module

    def evaluated(callback: EMA) -> Tensor:
        return fitted(callback, bench.policy).trainer.callback_metrics["eval/loss"]

    def exported(callback: Export, model: Any = bench.policy) -> list[str]:
        folder = bench.empty()
        with contextlib.chdir(folder):
            fitted(callback, model)
        return _files(folder)

    def exported_bytes(callback: Export) -> int:
        folder = bench.empty()
        with contextlib.chdir(folder):
            fitted(callback, bench.policy)
        return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))

    def exported_adapter(callback: Export) -> list[str]:
        return exported(callback, adapted)

    def saved(callback: RunCheckpoint) -> dict[str, int]:
        """Files, with the step each is of; the folder is the one in its name, below the current one."""
        folder = bench.empty()
        callback.dirpath = str(folder / Path(str(callback.dirpath)).name)
        module = SFTModule(copy.deepcopy(bench.policy), bench.tokenizer, optimizer=SGD, schedule=ConstantSchedule())
        trainer = bench.trainer([callback], enable_checkpointing=True, max_epochs=2)
        trainer.fit(module, _loader(bench.texts, bench.texts), _loader(bench.texts))
        return {path: torch.load(folder / path, weights_only=True)["global_step"] for path in _files(folder, "*.ckpt")}

    def guarded(callback: KLGuard) -> Any:
        """The coefficient after three rollouts, and how they ended."""
        policy, options = copy.deepcopy(bench.policy), {"beta": FixedKL(coef=0.1), "optimizer": SGD}
        options |= {"generation": SamplingParams(max_new_tokens=3), "schedule": ConstantSchedule()}
        module = PPOModule(policy, letters, **gathered(tokenizer=bench.tokenizer, **options))
        try:
            bench.trainer([callback]).fit(module, _loader(*[{"prompts": bench.prompts}] * 3))
        except RuntimeError as error:
            return [module.algorithm.kl.coef, module.iteration, str(error)]
        return [module.algorithm.kl.coef, module.iteration]

    def acted(action: Any) -> Any:
        return guarded(KLGuard(length=0.5, action=action))

    def inspected(callback: Preflight) -> Any:
        """Sequences of each pass, and how it ended."""
        options = {
            "tokenizer": bench.tokenizer,
            "schedule": ConstantSchedule(),
            "generation": SamplingParams(max_new_tokens=5),
        }
        module = PPOModule(copy.deepcopy(bench.policy), letters, **gathered(**options))
        module.configure_model()
        sizes: list[int] = []
        module.policy.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        try:
            bench.trainer([callback]).fit(module, _loader({"prompts": bench.prompts}))
        except ValueError as error:
            return [sizes, str(error)]
        return [sizes]

    def broken(callback: NonFiniteGuard) -> Any:
        """Files after two steps whose gradients are NaN, and how they ended."""
        module = SFTModule(copy.deepcopy(bench.policy), bench.tokenizer, optimizer=SGD, schedule=ConstantSchedule())
        module.configure_model()
        next(module.parameters()).register_hook(lambda gradient: gradient * torch.nan)
        folder = bench.empty()
        with contextlib.chdir(folder):
            try:
                bench.trainer([callback]).fit(module, _loader(bench.texts, bench.texts))
            except RuntimeError as error:
                return [_files(folder), str(error)]
        return [_files(folder)]

    def measured(callback: GradientNorms) -> int:
        """In how many of three rollouts it asks for the gradient of the texts."""
        options = {
            "tokenizer": bench.tokenizer,
            "schedule": ConstantSchedule(),
            "generation": SamplingParams(max_new_tokens=3),
        }
        module = PPOModule(copy.deepcopy(bench.policy), letters, **gathered(ptx_coef=1.0, **options))
        batches = [{"prompts": bench.prompts, "pretrain": bench.texts}] * 3
        with mock.patch.object(callback, "_share", wraps=callback._share) as share:
            bench.trainer([callback]).fit(module, _loader(*batches))
        return share.call_count

    def rolled_out(callback: RolloutLog | SampleLog) -> list[Any]:
        """Files, and what a logger's table shows."""
        folder = bench.empty()
        options = {
            "tokenizer": bench.tokenizer,
            "schedule": ConstantSchedule(),
            "generation": SamplingParams(max_new_tokens=3),
        }
        module = PPOModule(copy.deepcopy(bench.policy), letters, **gathered(**options))
        with contextlib.chdir(folder), mock.patch("lightning_rlhf.callbacks.sample_log.show") as show:
            trainer = bench.trainer([callback])
            trainer.fit(module, _loader({"prompts": bench.prompts}), _loader(bench.prompts))
            shown = [call.args[2] for call in show.call_args_list]
        return [_files(folder), shown]

    def shown(callback: RolloutProgress) -> list[str]:
        """Responses that the bar counts; speeds and times are of this machine."""
        options = {
            "tokenizer": bench.tokenizer,
            "schedule": ConstantSchedule(),
            "generation": SamplingParams(max_new_tokens=3),
        }
        module = PPOModule(copy.deepcopy(bench.policy), letters, **gathered(**options))
        bar = io.StringIO()
        with contextlib.redirect_stdout(bar):
            trainer = bench.trainer([callback, TQDMProgressBar()], enable_progress_bar=True)
            trainer.fit(module, _loader({"prompts": bench.prompts}))
        return list(dict.fromkeys(re.findall(r"\d+/\d+ responses", bar.getvalue())))

    def reported(callback: Report) -> list[str]:
        """Names of what it wrote about a log that lies where it looks."""
        folder = bench.empty()
        for run in ("out", "other"):
            (folder / run).mkdir()
            (folder / run / "metrics.csv").write_text("step,objective/scores\n0,1.0\n")
        with contextlib.chdir(folder):
            trainer = Trainer(logger=False, enable_checkpointing=False)
            callback.setup(trainer, None, "fit")
            callback.on_fit_end(trainer, None)
        return _files(folder)

    def referred(callback: MovingReference) -> list[Tensor]:
        usual = {"generation": SamplingParams(max_new_tokens=3), "optimizer": SGD, "schedule": ConstantSchedule()}
        module = PPOModule(copy.deepcopy(bench.policy), letters, tokenizer=bench.tokenizer, **usual)
        bench.trainer([callback]).fit(module, _loader({"prompts": bench.prompts}))
        return list(module.reference.frozen.parameters())  # type: ignore[union-attr]

    def predicted(callback: PredictionWriter) -> list[str]:
        folder = bench.empty()
        policy, generation = copy.deepcopy(bench.policy), SamplingParams(max_new_tokens=3)
        module = PPOModule(policy, letters, tokenizer=bench.tokenizer, generation=generation)
        with contextlib.chdir(folder):
            bench.trainer([callback]).predict(module, _loader(bench.prompts))
        return _files(folder)

    return {
        EMA: case(evaluated, decay=to(0.5)),
        Export: case(
            exported,
            {"folder": "out"},
            folder=to("elsewhere"),
            merge_adapter=to(True, by=exported_adapter),
            dtype=to("bfloat16", by=exported_bytes),
        ),
        GradientNorms: case(measured, every=to(2)),
        KLGuard: case(
            guarded,
            {"kl": 1e9, "length": 1e9},
            kl=to(1e-9),
            length=to(0.5),
            action=to(RaiseKL(), length=0.5),
        ),
        MovingReference: case(referred, {"every": 1}, alpha=to(0.3), every=to(9)),
        NonFiniteGuard: case(broken, {"folder": "out"}, limit=to(0), folder=to("elsewhere")),
        Preflight: case(inspected, prompts=to(3), tolerance=to(0.0)),
        RaiseKL: case(acted, factor=to(4.0)),
        RollBack: case(acted, limit=to(1)),
        Report: case(reported, {"folder": "out"}, folder=to("other"), output=to("elsewhere")),
        RolloutLog: case(rolled_out, {"folder": "out"}, folder=to("elsewhere")),
        RolloutProgress: case(shown, {"every": 1e9}, every=to(0.0)),
        RunCheckpoint: case(
            saved,
            {"dirpath": "out"},
            dirpath=to("elsewhere"),
            every_n_batches=to(2),
            monitor=to("eval/loss"),
            mode=to("min", monitor="eval/loss"),
            save_top_k=to(2, monitor="eval/loss"),
        ),
        SampleLog: case(rolled_out, {"folder": "out"}, folder=to("elsewhere"), table=to(1)),
        PredictionWriter: case(predicted, path=to("elsewhere.jsonl")),
    }


def _files(folder: Path, pattern: str = "*") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(pattern))


def _loader(*batches: Any) -> DataLoader[Any]:
    return DataLoader(list(batches), batch_size=None, shuffle=False)
