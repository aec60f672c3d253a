"""SmolLM2 learns to call a calculator: a short SFT on made dialogues, then GRPO with the tool, three seeds.

SmolLM2-135M-Instruct comes from a PyPI package. It cannot multiply numbers of three digits; the demonstrations show the
call in half of the phrasings, and the policy finds out about the others by reinforcement.

    python examples/calculator/run.py
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE, RUN = Path(__file__).parent, Path("runs/calculator")
CONFIGS = HERE.parent.parent / "configs"
SEEDS = (0, 1, 2)
BESIDE = [HERE, HERE.parent / "arithmetic", HERE.parent / "quickstart"]
"""Folders of the modules that the configs name."""


def demonstrate(precision: str) -> None:
    """Fine-tune on the demonstrations in this process."""
    from ingredients import smollm2

    from lightning_rlhf.cli import main as lightning_rlhf

    gguf = smollm2()
    model = [f"--model.model.path={gguf.parent}", f"--model.model.gguf_file={gguf.name}"]
    given = [f"--run={RUN / 'sft'}", "--seed_everything=0", f"--trainer.precision={precision}"]
    configs = [f"--config={CONFIGS / 'sft.yaml'}", f"--config={HERE / 'sft.yaml'}"]
    lightning_rlhf(["fit", *configs, *given, *model, f"--data.train={RUN / 'data' / 'demonstrations.jsonl'}"])


def train(seed: int, precision: str) -> None:
    """Measure the fine-tuned policy and train it by one seed in this process."""
    from lightning_rlhf.cli import main as lightning_rlhf

    data = [f"--data.{part}={RUN / 'data' / part}.jsonl" for part in ("train", "val")]
    given = [
        f"--seed_everything={seed}",
        f"--trainer.precision={precision}",
        f"--model.policy.path={RUN / 'sft' / 'model'}",
    ]
    configs = [f"--config={CONFIGS / 'grpo.yaml'}", f"--config={HERE / 'calculator.yaml'}"]
    lightning_rlhf(["validate", *configs, f"--run={RUN / f'before-{seed}'}", *given, *data])
    lightning_rlhf(["fit", *configs, f"--run={RUN / f'seed-{seed}'}", *given, *data])


def started(name: str, arguments: list[str], threads: int) -> None:
    """Run one part in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, BESIDE), os.environ.get("PYTHONPATH", "")])
    with (RUN / f"{name}.txt").open("w") as console:
        command = [sys.executable, __file__, *arguments]
        subprocess.run(command, env=environment, stdout=console, stderr=subprocess.STDOUT, check=True)
    print(f"{name}: done", flush=True)


def curve(seed: int) -> list[dict[str, float]]:
    """Success on held-out problems before training and at each validation, with the minutes until then."""
    points = []
    for run in (f"before-{seed}", f"seed-{seed}"):
        rollouts = 0
        (log,) = (RUN / run).glob("version_*/metrics.csv")
        with log.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rollouts += bool(row.get("objective/turns"))
                if row.get("eval/reward"):
                    numbers = {"success": row["eval/reward"], "turns": row["eval/turns"]}
                    numbers |= {"minutes": float(row["eval/elapsed"]) / 60 if rollouts else 0.0}
                    points.append({"rollouts": rollouts} | {name: float(x) for name, x in numbers.items()})
    return points


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["sft", "train"])
    parser.add_argument("--seed", type=int)
    parser.add_argument("--precision", default="bf16-mixed", help="32-true is faster on a CPU without bfloat16 units")
    given = parser.parse_args()
    if given.part == "sft":
        demonstrate(given.precision)
    elif given.part == "train":
        train(given.seed, given.precision)
    else:
        everything(given.precision)


def everything(precision: str) -> None:
    """Run all parts, and write the curves as a table and as a plot."""
    from problems import prepare

    prepare(RUN / "data", seed=0)
    common = ["--precision", precision]
    started("sft", ["--part", "sft", *common], threads=2)
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [(f"seed-{seed}", ["--part", "train", "--seed", str(seed), *common], 1) for seed in SEEDS]
        jobs[-1] = (*jobs[-1][:2], 2)  # the last has both cores
        list(pool.map(lambda job: started(*job), jobs))
    rows = [{"seed": seed} | point for seed in SEEDS for point in curve(seed)]
    with (RUN / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows({name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()} for row in rows)
    plot(rows, RUN / "curves.png")
    for seed in SEEDS:
        own = [row for row in rows if row["seed"] == seed]
        print(f"seed {seed}: {own[0]['success']:.2f} -> {own[-1]['success']:.2f} in {own[-1]['minutes']:.1f} min")
    print(f"{RUN / 'curves.csv'} and {RUN / 'curves.png'}")


def plot(rows: list[dict], path: Path) -> None:
    """Draw one line for each seed."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    figure, axis = plt.subplots(figsize=(6, 4))
    for seed in SEEDS:
        own = [row for row in rows if row["seed"] == seed]
        x, y = [row["rollouts"] for row in own], [row["success"] for row in own]
        axis.plot(x, y, marker=".", linewidth=1, label=f"seed {seed}")
    axis.set(xlabel="rollouts of 64 episodes", ylabel="success on held-out problems", ylim=(0, 1))
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
