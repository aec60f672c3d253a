"""What the quickstart shows at its end: a table before and after, sample pairs, a CSV and plots."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
from ingredients import vader

from lightning_rlhf.text.escape import terminal

plt.switch_backend("Agg")


def series(log: Path, name: str) -> list[float]:
    """The values of one metric in the newest CSV log below a folder, in the order they were logged."""
    newest = max(log.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    with newest.open(encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def column(measured: dict, name: str) -> list[float]:
    return [float(row[name]) for row in measured["responses"]]


def sentiment(measured: dict) -> list[float]:
    rows = measured["responses"]
    return vader([row["prompt"] for row in rows], [row["response"] for row in rows])


def table(before: dict, after: dict) -> list[tuple[str, float, float]]:
    """Rows of (what, before, after), means over the held-out prompts."""
    measures: dict[str, Callable[[dict], float]] = {
        "VADER score": lambda m: mean(sentiment(m)),
        "learned reward": lambda m: mean(column(m, "score")),
        "KL to SFT, nats per response": lambda m: mean(column(m, "kl")),
        "response length, tokens": lambda m: mean(column(m, "length")),
        "responses that end": lambda m: mean(column(m, "ended_number")),
        "pretraining loss, nats per token": lambda m: m["ptx_loss"],
    }
    for measured in (before, after):
        for row in measured["responses"]:
            row["ended_number"] = float(row["ended"])
    return [(name, measure(before), measure(after)) for name, measure in measures.items()]


def report(run: Path, before: dict, after: dict, seconds: dict[str, float]) -> None:
    """Print and write everything."""
    rows = table(before, after)
    gains = [a - b for a, b in zip(sentiment(after), sentiment(before), strict=True)]
    error = stdev(gains) / math.sqrt(len(gains))
    accuracy = series(run / "reward", "eval/accuracy")[-1]
    print(f"\n{'held-out prompts: ' + str(len(gains)):36s} {'before':>9s} {'after':>9s} {'change':>9s}")
    for name, first, last in rows:
        print(f"{name:36s} {first:9.3f} {last:9.3f} {last - first:+9.3f}")
    print(f"{'reward model accuracy, held out':36s} {accuracy:9.3f}")
    print(f"{'VADER gain, standard error':36s} {mean(gains):9.3f} {error:9.3f}")
    print(f"{'minutes':36s} {sum(seconds.values()) / 60:9.1f}")
    with (run / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["measure", "before", "after"])
        writer.writerows(rows)
        writer.writerow(["reward model accuracy", accuracy, ""])
        writer.writerows([f"seconds, {name}", value, ""] for name, value in seconds.items())
    print_pairs(before, after)
    plot_learning(run)
    plot_sentiment(run, before, after)
    print(f"\nsummary.csv, learning.png, sentiment.png and the responses are in {run}")
    print(f"to read the samples and the curves of all stages: lightning-rlhf report {run}")


def print_pairs(before: dict, after: dict, count: int = 5) -> None:
    """The first responses to the same prompts, before and after."""
    print("\nThe same prompts before and after (first five):")
    for first, last in list(zip(before["responses"], after["responses"], strict=True))[:count]:
        scores = [vader([""], [row["response"]])[0] for row in (first, last)]
        print(f"\n  {terminal(first['prompt'].strip())}")
        print(f"    before {scores[0]:+.2f}  {terminal(' '.join(first['response'].split()))}")
        print(f"    after  {scores[1]:+.2f}  {terminal(' '.join(last['response'].split()))}")


def plot_learning(run: Path) -> None:
    """What the RL stage did, rollout by rollout."""
    panels = {
        "objective/scores": "learned reward",
        "objective/kl": "KL to SFT, nats",
        "objective/response_length": "response length, tokens",
        "ptx/loss": "pretraining loss, nats",
        "policy/entropy_avg": "entropy, nats per token",
        "policy/ratio_var": "variance of the ratio",
    }
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    for axis, (name, label) in zip(axes.flat, panels.items(), strict=True):
        values = series(run / "ppo", name)
        axis.plot(range(1, len(values) + 1), values, marker="o", markersize=3)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("rollout")
        axis.grid(alpha=0.3)
    figure.suptitle("PPO-ptx on SmolLM2-135M, learned reward of VADER rankings")
    figure.savefig(run / "learning.png", dpi=120)
    plt.close(figure)


def plot_sentiment(run: Path, before: dict, after: dict) -> None:
    """The labeler's view: VADER of the held-out responses."""
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    groups = [sentiment(before), sentiment(after)]
    axis.hist(
        groups,
        bins=[x / 5 for x in range(-5, 6)],
        label=[f"before, mean {mean(groups[0]):+.2f}", f"after, mean {mean(groups[1]):+.2f}"],
    )
    axis.set_xlabel("VADER compound score of the response")
    axis.set_ylabel("held-out prompts")
    axis.legend()
    figure.savefig(run / "sentiment.png", dpi=120)
    plt.close(figure)
