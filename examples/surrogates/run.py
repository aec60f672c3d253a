"""Which surrogate? Reward against KL for CLIP, KLPEN and the plain ratio, on a bandit and on SmolLM2-135M.

    python examples/surrogates/run.py

writes bandit.csv, model.csv, surrogates.png and WRITEUP.md. Finished runs of the model are kept: an interrupted study
resumes. After a change of size, give another folder.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import experiments
import torch
from grid import read


def arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/surrogates"), help="folder of the results")
    parser.add_argument("--parts", nargs="*", choices=("bandit", "model"), default=("bandit", "model"))
    parser.add_argument("--seeds", type=int, default=8, help="of the bandit")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: all cores")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> None:
    """Run the parts that were asked for, then report on all there is; no parts: report only."""
    chosen = arguments(args)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    chosen.out.mkdir(parents=True, exist_ok=True)
    if "bandit" in chosen.parts:
        experiments.study(chosen.out / "bandit.csv", experiments.Size(seeds=chosen.seeds))
    if "model" in chosen.parts:
        import model

        model.study(chosen.out / "model.csv", model.smollm2, model.Size())
    report(chosen.out)


def report(folder: Path) -> None:
    """The picture and the write-up of the CSV files in a folder."""
    from plot import plot
    from writeup import writeup

    parts = [read(folder / f"{part}.csv") for part in ("bandit", "model")]
    plot(folder / "surrogates.png", *parts)
    (folder / "WRITEUP.md").write_text(writeup(*parts), encoding="utf-8")
    print(f"bandit.csv, model.csv, surrogates.png and WRITEUP.md are in {folder}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    main()
