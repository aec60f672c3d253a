"""Rewards in the box on the command line, each by one word, with rows of Reasoning Gym as data."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lightning_rlhf.cli import main

ROWS = "{task: chain_sum, size: 40, share: 0.3, config: {min_terms: 2, max_terms: 2, max_digits: 1}, part: %s}"


@pytest.mark.parametrize(
    ("word", "arguments"),
    [
        ("ReasoningGym", ["--model.reward.extract=last_number"]),
        ("MathAnswer", []),
        ("RegexMatch", [r"--model.reward.pattern=(\d)", "--model.reward.column=answer"]),
        ("Format", ["--model.reward.tags=[think]"]),
    ],
)
def test_a_step_of_ppo(ppo, workplace: Path, word: str, arguments: list[str]):
    words = ppo(model__reward__path=None, data__train=ROWS % "train", data__val=ROWS % "val")
    cli = main(["fit", *words, f"--model.reward={word}", *arguments, "--trainer.limit_train_batches=1"])
    assert cli.trainer.global_step > 0
    assert type(cli.model.reward).__name__ == word
    with next(workplace.rglob("metrics.csv")).open() as file:
        means = [row["objective/raw_scores"] for row in csv.DictReader(file) if row.get("objective/raw_scores")]
    assert means
    assert all(0 <= float(mean) <= 1 for mean in means)


def test_a_step_of_ppo_on_episodes(ppo, workplace: Path):
    """The environment of the questions, named in words as well, whose random policy is told that it is wrong."""
    words = ppo(model__reward__path=None, data__train=ROWS % "train", data__val=ROWS % "val")
    factory = "--model.environment.factory={class_path: ReasoningGymEnvironment, init_args: {attempts: 3, seconds: 60}}"
    settings = [
        factory,
        "--model.reward=EnvironmentReward",
        "--model.environment.turns=2",
        "--model.generation.max_new_tokens=24",
    ]
    cli = main(["fit", *words, *settings, "--trainer.limit_train_batches=1"])
    assert cli.trainer.global_step > 0
    with next(workplace.rglob("metrics.csv")).open() as file:
        turns = [float(row["objective/turns"]) for row in csv.DictReader(file) if row.get("objective/turns")]
    assert turns
    assert max(turns) > 1
