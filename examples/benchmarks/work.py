"""What a step has to do, the same for every side: model, sizes, precision, and how responses end."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("bf16-mixed", "32-true")


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step: prompts in, one rollout, one optimizer step on all of it (RLOO, one inner epoch, one minibatch)."""

    model: str = "smollm2"
    """`smollm2` (135M), or a random Llama: `medium` (24 layers x 1024, V = 49152), `tiny` (4 x 256, V = 8192) or `toy`
    (2 x 32, for tests)."""
    device: str = "cpu"
    """Of all sides: `cpu` or `cuda`."""
    precision: str = "bf16-mixed"
    """Lightning's flag; TRL's `bf16` follows it."""
    prompts: int = 8
    """To a step."""
    samples: int = 2
    """Responses to a prompt."""
    tokens: int = 48
    """Longest response."""
    end: float | None = 0.0
    """Probability of the end token at every position; 0 forces full length, None leaves the model alone."""
    beta: float = 0.05
    lr: float = 1e-5
    seed: int = 0
    steps: int = 1
    """Of the whole run, the warm-up included."""
    ours: dict[str, Any] = field(default_factory=dict)
    """More arguments of `PPOModule`, and of its parts as `generation.NAME`, `updates.NAME` and `algorithm.NAME`."""
    attention: str = "eager"
    """Kernel of our side and of the floor. TRL keeps its default, SDPA."""
    folder: str = ""
    """Where `models.py` wrote network, tokenizer and prompts."""

    @property
    def responses(self) -> int:
        return self.prompts * self.samples

    def json(self) -> str:
        return json.dumps(asdict(self))

    def options(self, part: str | None = None) -> dict[str, Any]:
        """What `ours` says of a part, or of the module itself."""
        split = ((name.rpartition("."), value) for name, value in self.ours.items())
        return {name: value for (owner, _, name), value in split if owner == (part or "")}

    def having(self, **changes: Any) -> Work:
        return replace(self, **changes)


SIZES = {
    "smollm2": {"prompts": 8},
    "medium": {"prompts": 32, "tokens": 128},
    "tiny": {"prompts": 32},
    "toy": {"prompts": 2, "tokens": 4},
}
"""16 responses of SmolLM2, 64 of the tiny model, as in the issue's targets; 64 of the one for a GPU."""


def parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options that all commands share."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--models", nargs="+", default=["smollm2"], choices=tuple(SIZES), help="what is trained")
    found.add_argument("--precisions", nargs="+", default=["bf16-mixed"], choices=PRECISIONS)
    found.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="on which all sides run")
    found.add_argument("--threads", type=int, default=1, help="of torch, in every process")
    found.add_argument("--attention", default="eager", help="attention kernel of our side and of the floor")
    found.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=JSON", help="more arguments of ours, as updates.microbatch=8"
    )
    found.add_argument("--out", type=Path, default=None, help=f"folder of the CSV files; None: {RESULTS.name}/ here")
    found.add_argument("--quick", action="store_true", help="a toy model, seconds; writes to runs/benchmarks")
    found.set_defaults(**defaults)
    return found


def parsed(options: argparse.ArgumentParser, args: Sequence[str] | None, **quick: Any) -> argparse.Namespace:
    """The arguments; under `--quick` the defaults are the toy model in fp32 and what `quick` says."""
    chosen = options.parse_args(args)
    if chosen.quick:
        options.set_defaults(models=["toy"], precisions=["32-true"], **quick)
        chosen = options.parse_args(args)
    chosen.out = chosen.out or (Path("runs/benchmarks") if chosen.quick else RESULTS)
    chosen.set = pairs(chosen.set)
    if "trl" in getattr(chosen, "sides", ()) and find_spec("trl") is None:
        print("TRL is not installed (pip install '.[benchmarks]'): its side is left out")
        chosen.sides = [side for side in chosen.sides if side != "trl"]
    chosen.out.mkdir(parents=True, exist_ok=True)
    return chosen


def works(chosen: argparse.Namespace) -> list[Work]:
    """One for each model and precision that was asked for."""
    common = {"ours": chosen.set, "attention": chosen.attention, "device": chosen.device}
    return [
        Work(model=model, precision=precision, **SIZES[model], **common)
        for model in chosen.models
        for precision in chosen.precisions
    ]


def pairs(texts: Sequence[str]) -> dict[str, Any]:
    """`name=json` as arguments."""
    split = (text.partition("=") for text in texts)
    return {name: json.loads(value) for name, _, value in split}
