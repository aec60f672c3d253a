"""A sweep by overrides of the command line: each trial is one `lightning-rlhf fit`, in this process.

Optuna optimizes `objective` as it is; a random search needs no more than `Draw` below:
    study = optuna.create_study(direction="maximize")
    study.optimize(partial(objective, arguments=sys.argv[1:]), n_trials=20)
"""

import math
import random
import sys
from typing import Any

from lightning_rlhf.cli import main

PRICE = 0.02  # of a nat: without it, a sweep finds whoever leaves the reference furthest behind


def objective(trial: Any, arguments: list[str]) -> float:
    """Reward less the price of the KL, on the held-out prompts after training."""
    flags = {
        "optimizer.init_args.lr": trial.suggest_float("lr", 1e-7, 1e-5, log=True),
        "algorithm.beta": trial.suggest_float("coef", 0.003, 0.1, log=True),
        "algorithm.surrogate": trial.suggest_categorical("surrogate", ["Clip", "KLPen"]),
    }
    overrides = [f"--model.{name}={value}" for name, value in flags.items()]
    found = main(["fit", *arguments, *overrides]).trainer.callback_metrics
    return float(found["eval/reward"] - PRICE * found["eval/kl"])


class Draw(random.Random):
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return math.exp(self.uniform(math.log(low), math.log(high))) if log else self.uniform(low, high)

    def suggest_categorical(self, name: str, choices: list[str]) -> str:
        return self.choice(choices)


if __name__ == "__main__":
    values = {seed: objective(Draw(seed), sys.argv[1:]) for seed in range(20)}
    print(f"best is runs/sweep/version_{max(values, key=lambda seed: values[seed])} of {values}")
