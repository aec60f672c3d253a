"""GRPO learns sums of two digits, with and without dynamic sampling: three seeds each, two at a time on two cores.

SmolLM2-135M-Instruct comes from a PyPI package, the problems and their grader from Reasoning Gym. Held-out problems
have operands that no trained one has.

    python examples/arithmetic/run.py
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE, RUN = Path(__file__).parent, Path("runs/arithmetic")
CONFIGS = HERE.parent.parent / "configs"
SEEDS = (0, 1, 2)
METHODS = {
    "grpo": ["--trainer.max_steps=40"],
    "dynamic": ["--trainer.max_steps=25", "--model.algorithm.dynamic_sampling.batches=4"],
}
"""Flags of each method; the second draws up to four batches a rollout."""


def train(method: str, seed: int, precision: str) -> None:
    """Run one method with one seed in this process."""
    sys.path[:0] = [str(HERE), str(HERE.parent / "quickstart")]
    from ingredients import smollm2
    from sums import prepare

    from lightning_rlhf.cli import main as lightning_rlhf

    gguf, files = smollm2(), prepare(RUN / f"{method}-{seed}" / "data")
    policy = [f"--model.policy.path={gguf.parent}", f"--model.policy.gguf_file={gguf.name}"]
    data = [f"--data.{part}={path}" for part, path in files.items()]
    configs = [f"--config={CONFIGS / 'grpo.yaml'}", f"--config={HERE / 'arithmetic.yaml'}"]
    given = [f"--run={RUN / f'{method}-{seed}'}", f"--seed_everything={seed}", f"--trainer.precision={precision}"]
    lightning_rlhf(["fit", *configs, *given, *policy, *data, *METHODS[method]])


def started(method: str, seed: int, precision: str) -> None:
    """Run one method with one seed in a process of its own, on one core."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    folder = RUN / f"{method}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--method", method, "--seed", str(seed), "--precision", precision]
    with (folder / "console.txt").open("w") as console:
        subprocess.run(command, env=environment, stdout=console, stderr=subprocess.STDOUT, check=True)
    print(f"{method}, seed {seed}: done", flush=True)


def curve(method: str, seed: int) -> list[dict[str, float]]:
    """Pass rate on held-out problems with the tokens drawn and the minutes until then, by validation."""
    (log,) = (RUN / f"{method}-{seed}").glob("version_*/metrics.csv")
    points, tokens, rollouts = [], 0.0, 0
    with log.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row.get("objective/response_length"):
                rollouts += 1
                drawn = float(row["objective/response_length"]) * 64
                tokens += float(row.get("filter/tokens") or drawn)
            if row.get("eval/pass_at_1"):
                minutes = float(row["eval/elapsed"]) / 60
                point = {"rollouts": rollouts, "tokens": tokens, "minutes": minutes}
                points.append(point | {"pass_rate": float(row["eval/pass_at_1"])})
    return points


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--precision", default="bf16-mixed", help="32-true is faster on a CPU without bfloat16 units")
    given = parser.parse_args()
    if given.method:
        train(given.method, given.seed, given.precision)
        return
    jobs = [(method, seed) for method in METHODS for seed in SEEDS]
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda job: started(*job, given.precision), jobs))
    write([{"method": method, "seed": seed} | point for method, seed in jobs for point in curve(method, seed)])


def write(rows: list[dict]) -> None:
    """Write the curves as a table and as a plot beside it, and print each run's end."""
    from plot import plot

    path = RUN / "curves.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows({name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()} for row in rows)
    plot(rows, RUN / "curves.png")
    for method in METHODS:
        for seed in SEEDS:
            own = [row for row in rows if (row["method"], row["seed"]) == (method, seed)]
            reached = next((row for row in own if row["pass_rate"] >= 0.75), None)
            when = "never" if reached is None else f"after {reached['minutes']:.1f} min, {reached['tokens']:.0f} tokens"
            print(f"{method:8} seed {seed}: {own[0]['pass_rate']:.2f} -> {own[-1]['pass_rate']:.2f}; 0.75 {when}")
    print(f"{path} and {RUN / 'curves.png'}")


if __name__ == "__main__":
    main()
