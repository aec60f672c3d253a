"""Seconds of a step by phase: in the process, on a server, and on a server that draws ahead.

python examples/vllm/steps.py MODEL_FOLDER --python .venv-vllm/bin/python

Server and trainer have a core each, and so has the trainer that samples by itself. Linux alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

SERVER, TRAINER = 0, 1
PROMPTS = ("Once upon a time", "The best way to learn is", "My favorite meal is", "In the morning", "Dear friend,")
WAYS = ("process", "server", "overlap")
PHASES = ("sync", "generate", "reference", "old_logprobs", "reward", "update", "step")


def step_times(options: argparse.Namespace) -> None:
    """Train by one of the ways, in a process of its own, and print the phases of each step as JSON."""
    import torch
    from lightning.pytorch import Callback, Trainer

    from lightning_rlhf import RLOO, PPOModule, PromptDataModule, SamplingParams
    from lightning_rlhf.engines import VLLMServer
    from lightning_rlhf.models import ModelSource

    torch.set_num_threads(1)
    rows: list[dict[str, float]] = []

    class Times(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
            rows.append({name: logged.get(f"time/{name}", 0.0) for name in PHASES})

    engine = None if options.way == "process" else VLLMServer(urls=[options.url], overlap=options.way == "overlap")
    module = PPOModule(
        ModelSource(path=options.model),
        brevity,
        algorithm=RLOO(),
        generation=SamplingParams(max_new_tokens=options.tokens, samples_per_prompt=4, seed=0),
        engine=engine,
    )
    data = PromptDataModule(train=[{"prompt": text} for text in PROMPTS * 200], batch_size=options.responses // 4)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        accelerator="cpu", devices=1, precision=options.precision, max_epochs=1, limit_train_batches=options.steps,
        callbacks=[Times()], num_sanity_val_steps=0, **quiet,
    )  # fmt: skip
    trainer.fit(module, data)
    print(json.dumps(rows))


def brevity(prompts: list[str], responses: list[str]) -> list[float]:
    return [-len(response) / 100 for response in responses]


def measured(way: str, url: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Steps of one way without the first, in a process on a core of its own."""
    words = ["--way", way, "--url", url, "--steps", str(options.steps), "--tokens", str(options.tokens)]
    words += ["--responses", str(options.responses), "--precision", options.precision]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = ["taskset", "-c", str(TRAINER), sys.executable, __file__, options.model, *words]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the policy")
    parser.add_argument("--python", default=sys.executable, help="of the environment that has vLLM")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--responses", type=int, default=32)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--url", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        step_times(options)
        return
    from lightning_rlhf.engines.vllm import LocalServer, ServerProcess

    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": str(SERVER)}
    dtype = "float32" if options.precision.startswith("32") else "bfloat16"
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {SERVER})  # which the server inherits
    with ServerProcess(options.model, LocalServer(python=options.python, dtype=dtype, max_model_len=256)) as server:
        os.sched_setaffinity(0, everywhere)
        medians = {}
        for way in WAYS:
            rows = measured(way, server.url, options)
            medians[way] = {phase: median(row[phase] for row in rows) for phase in PHASES}
    lines = ["| s | " + " | ".join(PHASES) + " | steps/min |", "|" + "---|" * (len(PHASES) + 2)]
    for way, of in medians.items():
        lines.append(f"| {way} | " + " | ".join(f"{of[p]:.2f}" for p in PHASES) + f" | {60 / of['step']:.2f} |")
    gain = medians["server"]["step"] / medians["overlap"]["step"]
    text = "\n".join([*lines, f"\noverlap: {gain:.2f} times the steps per minute of the server without it"])
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
