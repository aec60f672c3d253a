"""What the bandit part runs: four experiments, a row per seed and checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any

from bandit import BETA, Bandit, Learner, Run, gradient_noise, kl
from grid import NAMES, Scale, append
from torch import Tensor

from lightning_rlhf.core import (
    BanditAdvantage,
    BatchMean,
    KLPen,
    LeaveOneOut,
    LinearSchedule,
    NoBaseline,
    RunningMean,
)

SCALE = Scale(beta=BETA, b=2.0, target=0.02)
MEANS = (0.0, 2.0)
SETTINGS = ("experiment", "surrogate", "baseline", "score_mean", "beta", "b", "epochs", "lr")
EXACT = ("reward", "kl", "objective", "best", "gap_closed", "kl_best", "kl_old", "kl_to_best")
COLUMNS = (*SETTINGS, "seed", "rollout", *EXACT, "noise_start", "noise_end")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is run."""

    seeds: int = 8
    rollouts: int = 100
    draws: int = 256
    """Rollouts over which the variance of the gradient is taken."""
    epochs: tuple[int, ...] = (1, 4, 16)
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    prices: tuple[float, ...] = (0.1, 0.5, 1.0, 4.0)
    """KLPEN's b, in the experiment without noise."""
    steps: int = 150
    """Optimizer steps that maximize KLPEN's surrogate there."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run and its names in the CSV file."""

    names: dict[str, Any]
    run: Run
    mean: float = 2.0
    every: bool = False
    """Rows along the way too, not only the last."""


def grid(size: Size) -> Iterator[Trial]:
    """Surrogate x KL to SFT or none x inner epochs, along the way."""
    for name, beta, epochs in SCALE.runs():
        names = {"surrogate": name, "baseline": "batch mean"}
        run = Run(surrogate=SCALE.surrogate(name), beta=beta, epochs=epochs, rollouts=size.rollouts)
        yield Trial(names=names, run=run, every=True)


def trust(size: Size) -> Iterator[Trial]:
    """Surrogate x inner epochs x learning rate, as many rollouts for each."""
    for name, epochs, lr in product(NAMES, size.epochs, size.rates):
        run = Run(surrogate=SCALE.surrogate(name), epochs=epochs, lr=lr, rollouts=size.rollouts)
        yield Trial(names={"surrogate": name, "baseline": "batch mean"}, run=run)


def fixed_point(size: Size) -> Iterator[Trial]:
    """KLPEN's surrogate maximised over all responses, then re-centered: no noise is left, only b and beta."""
    for b, beta in product(size.prices, (BETA, 0.0)):
        surrogate = KLPen(coef=b, target=None)
        run = Run(surrogate=surrogate, beta=beta, samples=0, minibatches=1, epochs=size.steps, rollouts=30, lr=0.02)
        yield Trial(names={"surrogate": "KLPEN fixed", "baseline": "batch mean"}, run=run, every=True)


BASELINES = {
    "none": NoBaseline(),
    "batch mean": BatchMean(),
    "running mean": RunningMean(),
    "leave-one-out": LeaveOneOut(),
}


def baselines(size: Size) -> Iterator[Trial]:
    """Baseline x mean score x inner epochs, with CLIP and a learning rate that falls to 0."""
    for (name, baseline), mean, epochs in product(BASELINES.items(), MEANS, (1, 4)):
        advantage = BanditAdvantage(baseline=baseline)
        run = Run(advantage=advantage, epochs=epochs, rollouts=size.rollouts, schedule=LinearSchedule())
        yield Trial(names={"surrogate": "CLIP", "baseline": name}, run=run, mean=mean)


EXPERIMENTS = {"grid": grid, "trust": trust, "fixed point": fixed_point, "baselines": baselines}
CHECKPOINTS = (1, 3, 10, 30)


def noise(bandit: Bandit, trial: Trial, size: Size) -> dict[str, list[float]]:
    """Variance of the gradient of one rollout at pi_SFT and at pi*, relative to |grad J|^2 at pi_SFT, per seed."""
    found: dict[str, list[float]] = {"noise_start": [], "noise_end": []}
    for seed in range(len(bandit.scores)):
        one = Bandit(scores=bandit.scores[seed : seed + 1], logp_ref=bandit.logp_ref[seed : seed + 1])
        signal = one.gradient(one.logp_ref).square().sum()
        for name, at in (("noise_start", one.logp_ref), ("noise_end", one.optimum())):
            settled = trial.run.advantage.adapted(float(one.objective(at)))  # what a running mean settles at
            found[name].append(gradient_noise(one, settled, at, draws=size.draws, samples=8) / float(signal))
    return found


def checkpoint(bandit: Bandit, learner: Learner, kl_old: Tensor) -> dict[str, list[float]]:
    """The exact figures of the policies as they are, per seed."""
    logp, optimum = learner.logp.detach(), bandit.optimum()
    exact = {"reward": bandit.reward(logp), "kl": bandit.kl(logp), "objective": bandit.objective(logp)}
    exact |= {"best": bandit.best(), "gap_closed": bandit.gap_closed(logp), "kl_best": bandit.kl(optimum)}
    exact |= {"kl_old": kl_old, "kl_to_best": kl(logp, optimum)}
    return {name: values.tolist() for name, values in exact.items()} | {"b": learner.prices()}


def rows_of(experiment: str, trial: Trial, size: Size) -> Iterator[dict[str, object]]:
    """A row per seed and checkpoint."""
    seeds = range(size.seeds)
    bandit, run = Bandit.drawn(seeds, mean=trial.mean), trial.run
    learner = Learner(bandit, run)
    named = {"experiment": experiment, "score_mean": trial.mean, "beta": run.beta, "epochs": run.epochs, "lr": run.lr}
    extra = noise(bandit, trial, size) if experiment == "baselines" else {}
    for rollout, kl_old in learner.train():
        last = rollout == run.rollouts
        if last or (trial.every and rollout in CHECKPOINTS):
            found = checkpoint(bandit, learner, kl_old) | (extra if last else {})
            for seed in seeds:
                own = {name: values[seed] for name, values in found.items()}
                yield named | trial.names | {"seed": seed, "rollout": rollout} | own


def study(path: Path, size: Size) -> None:
    """Run all experiments; the file is written whole, since they take minutes only."""
    rows: list[dict[str, object]] = []
    for experiment, trials in EXPERIMENTS.items():
        start = process_time()
        for trial in trials(size):
            rows += rows_of(experiment, trial, size)
        print(f"bandit, {experiment}: {process_time() - start:.0f} s of processor time", flush=True)
    path.unlink(missing_ok=True)
    append(path, COLUMNS, rows)
