"""The head of the page: what was run, and a verdict whose numbers and doubts are of the logs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from run_files import Rows, sample, write_csv, write_jsonl

from lightning_rlhf.report import Run, read_runs
from lightning_rlhf.report.header import facts
from lightning_rlhf.report.verdict import verdict

CONFIG = """
seed_everything: 7
model:
  class_path: lightning_rlhf.PPOModule
  init_args:
    policy: {path: models/sft, dtype: float32}
    reward: {class_path: lightning_rlhf.LearnedReward, init_args: {path: models/reward}}
    algorithm: {class_path: lightning_rlhf.GRPO, init_args: {beta: 0.04}}
    generation: {samples_per_prompt: 8}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 2.5e-06}}
data: {class_path: lightning_rlhf.PromptDataModule, init_args: {batch_size: 4}}
"""
STEPS: Rows = [{"step": i, "episode": 32 * (i + 1), "objective/scores": 0.1 * i, "time/step": 60} for i in range(3)]


def run_of(folder: Path, rows: Rows, *, samples: Rows = (), rollouts: Rows = (), **files: str) -> Run:
    """A run whose settings were written at 0 h and whose last metrics at 2 h 5 min of the first of January 2026."""
    write_csv(folder / "version_0" / "metrics.csv", rows)
    for name, text in files.items():
        (folder / "version_0" / f"{name}.yaml").write_text(text)
        os.utime(folder / "version_0" / f"{name}.yaml", (1767225600, 1767225600))
    os.utime(folder / "version_0" / "metrics.csv", (1767225600 + 7500, 1767225600 + 7500))
    for name, lines in (("samples", samples), ("rollouts", rollouts)):
        if lines:
            write_jsonl(folder / f"{name}.jsonl", lines)
    (run,) = read_runs([folder])
    return run


def test_facts_are_those_of_settings_and_logs(tmp_path: Path) -> None:
    assert facts(run_of(tmp_path / "run", STEPS, config=CONFIG)) == {
        "method": "PPOModule, GRPO",
        "policy": "models/sft",
        "reward": "LearnedReward",
        "reward model": "models/reward",
        "batch": "4 prompts × 8 samples, 32 responses a rollout",
        "learning rate": "2.5e−06",
        "β": "0.04",
        "seed": "7",
        "length": "3 rollouts",
        "dates": "2026-01-01 00:00 – 02:05 UTC",
        "took": "2 h 5 min",
    }


def test_what_no_log_has_is_left_out(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [{"step": 4, "train/loss": 2.0}], hparams="lr: 0.001\nmodel: models/base\n")
    assert facts(run).keys() == {"model", "learning rate", "length", "dates", "took"}
    assert (facts(run)["model"], facts(run)["length"]) == ("models/base", "5 optimizer steps")
    assert facts(run_of(tmp_path / "bare", [{"step": 0, "lr": 1e-3}])) == {"length": "1 optimizer step"}


def test_default_algorithm_is_the_bandit(tmp_path: Path) -> None:
    bandit = CONFIG.replace("GRPO, init_args: {beta: 0.04}", "Algorithm, init_args: {level: SequenceLevel}")
    token = bandit.replace("SequenceLevel", "TokenLevel")
    assert facts(run_of(tmp_path / "a", STEPS, config=bandit))["method"] == "PPOModule, contextual bandit"
    assert facts(run_of(tmp_path / "b", STEPS, config=token))["method"] == "PPOModule, Algorithm"


def test_dates_of_copied_files_are_left_out(tmp_path: Path) -> None:
    """Copies are all of one moment: the steps alone say how long they took, three times 60 s."""
    run_of(tmp_path / "run", STEPS, config=CONFIG)
    os.utime(tmp_path / "run" / "version_0" / "metrics.csv", (1767225602, 1767225602))
    (run,) = read_runs([tmp_path / "run"])
    assert "dates" not in facts(run)
    assert facts(run)["took"] == "3 min 0 s in its steps"


def test_verdict_of_rl_is_of_held_out_responses(tmp_path: Path) -> None:
    rows = [sample(0, i, 1.0 + 0.1 * i, "a") for i in range(4)] + [
        sample(8, i, 3.0 + 0.1 * i, "b", ended=i > 0) for i in range(4)
    ]
    judged = verdict(run_of(tmp_path / "run", STEPS, samples=rows))
    assert judged.said == "Held-out reward +2 (1.15 → 3.15) for 4 nats of KL; 75 % of the responses end."
    assert judged.doubts == ("Responses stop ending: 100 % → 75 %.",)


def test_verdict_without_evaluation_says_so(tmp_path: Path) -> None:
    judged = verdict(run_of(tmp_path / "run", [row | {"objective/kl": 0.5} for row in STEPS]))
    assert judged.said == "Reward +0.2 (0 → 0.2) for 0.5 nats of KL."
    assert judged.doubts == ("No held-out evaluation was logged: these are training responses.",)


@pytest.mark.parametrize(("gain", "doubts"), [(1.5, 1), (1.7, 0)])
def test_reward_within_its_error_is_doubted(tmp_path: Path, gain: float, doubts: int) -> None:
    """Scores of −1 and 1 twice: s² = 4/3, so the error of the difference is √(2/3), and 1.96 of them 1.6."""
    rows = [sample(i, j, s + gain * bool(i), "a") for i in (0, 8) for j, s in enumerate([-1.0, 1.0] * 2)]
    judged = verdict(run_of(tmp_path / "run", [{"step": 0, "lr": 1.0}], samples=rows))
    assert judged.doubts == ("The reward did not move by more than its error, ±1.6 (95 %).",) * doubts


def test_reward_that_stands_still_or_is_no_number_is_doubted(tmp_path: Path) -> None:
    still, broken = (
        [{"step": i, "objective/scores": y} for i, y in enumerate(ys)] for ys in ([1.0, 1.0], [1.0, "nan"])
    )
    assert verdict(run_of(tmp_path / "a", still)).doubts[1:] == ("The reward did not move.",)
    assert verdict(run_of(tmp_path / "b", broken)).doubts[1:] == ("The reward is not a number at one end of the run.",)


def test_one_is_no_plural(tmp_path: Path) -> None:
    config = CONFIG.replace("batch_size: 4", "batch_size: 1")
    run = run_of(tmp_path / "run", [{"step": 0, "objective/scores": 1.0, "episode": 1}], config=config)
    assert (facts(run)["batch"], facts(run)["length"]) == ("1 prompt × 8 samples, 1 response a rollout", "1 rollout")


def test_verdict_of_fine_tuning(tmp_path: Path) -> None:
    rows = [{"step": i, "train/loss": 3.0 - i} for i in range(2)]
    held = [{"step": 0, "eval/loss": 2.5}, {"step": 1, "eval/loss": 2.0}, {"step": 2, "eval/loss": 2.25}]
    assert verdict(run_of(tmp_path / "a", rows)).said == "Training loss 3 → 2."
    assert verdict(run_of(tmp_path / "a", rows)).doubts == ("No held-out evaluation was logged.",)
    assert verdict(run_of(tmp_path / "b", held)).said == "Held-out loss 2.5 → 2.25."
    assert verdict(run_of(tmp_path / "b", held)).doubts == ("The held-out loss was lower before, 2: overfitting.",)


def test_verdict_of_a_reward_model(reward_run: Path) -> None:
    (run,) = read_runs([reward_run])
    assert verdict(run).said == "Accuracy 0.75 on 20 held-out pairs."
    assert verdict(run).doubts == ()


def test_reward_model_that_likes_length_is_doubted(tmp_path: Path) -> None:
    row = {"step": 1, "eval/accuracy": 0.6, "eval/longer_wins": 0.65, "eval/pairs_confidence_50_60": 10}
    doubts = verdict(run_of(tmp_path / "run", [row])).doubts
    assert doubts == (
        "So few pairs do not tell it from a coin.",
        "It is no better than preferring the longer response.",
    )
