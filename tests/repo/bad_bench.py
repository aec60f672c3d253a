"""What the tables of bad input are written with: a case, and a place to build its files in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GOOD: dict[str, Any] = {
    "sft": {"prompt": "a b", "response": "c d"},
    "reward": {"prompt": "a b", "chosen": "c d", "rejected": "e"},
    "ppo": {"prompt": "a b"},
    "text": {"text": "a b c d e f g h"},
}
QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
QUIET += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_steps=1"]


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: of the test.
        arguments: the command line, given a `Bench`.
        code: exit status: 2 for a bad config, 1 for bad data or a bad model.
        says: patterns that the sentence must hold.
    """

    name: str
    arguments: Callable[[Bench], list[str]]
    code: int
    says: tuple[str, ...]


def case(name: str, arguments: Callable[[Bench], list[str]], *says: str, code: int = 1) -> Case:
    return Case(name, arguments, code, says)


@dataclass
class Bench:
    """Good folders and files, and a place for bad ones.

    Attributes:
        tiny: the folders and files of `conftest.Tiny`; they are not changed.
        place: an empty folder.
    """

    tiny: Any
    place: Path
    made: int = field(default=0)

    def file(self, content: bytes | str, name: str = "bad.jsonl") -> str:
        path = self.place / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return str(path)

    def rows(self, *rows: Any) -> str:
        return self.file("".join(json.dumps(row) + "\n" for row in rows))

    def folder(self, kind: str = "policy", *, without: tuple[str, ...] = (), **changes: Any) -> Path:
        """A copy of a good folder. `changes` of `config.json`; files that match `without` are left out."""
        self.made += 1
        copy = self.place / f"{kind}{self.made}"
        shutil.copytree(getattr(self.tiny, kind), copy, ignore=shutil.ignore_patterns(*without))
        if changes:
            config = copy / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        return copy

    def change(self, file: Path, **changes: Any) -> Path:
        """A JSON file with other values; its folder."""
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return file.parent

    def sft(self, *more: str, model: Any = None, train: str | None = None) -> list[str]:
        train = train or self.tiny.file("demonstrations")
        named = [f"--model.model.path={model or self.tiny.policy}", f"--data.train={train}"]
        return ["fit", *QUIET, "--model=SFTModule", "--data=DemonstrationDataModule", *named, *more]

    def reward(self, *more: str, model: Any = None, train: str | None = None) -> list[str]:
        train = train or self.tiny.file("rankings")
        named = [f"--model.model.path={model or self.tiny.policy}", f"--data.train={train}"]
        return ["fit", *QUIET, "--model=RewardModule", "--data=ComparisonDataModule", *named, *more]

    def ppo(self, *more: str, policy: Any = None, reward: Any = None, train: str | None = None) -> list[str]:
        named = [f"--model.policy.path={policy or self.tiny.policy}", "--model.reward=LearnedReward"]
        named += [
            f"--model.reward.path={reward or self.tiny.reward}",
            f"--data.train={train or self.tiny.file('prompts')}",
        ]
        small = ["--data.batch_size=2", "--model.generation.max_new_tokens=4", "--model.updates.minibatch=2"]
        return ["fit", *QUIET, "--model=PPOModule", "--data=PromptDataModule", *named, *small, *more]

    def fit(self, kind: str, train: str) -> list[str]:
        """The stage of that name on that file; `text` is PPO's pretraining stream."""
        if kind == "text":
            return self.ppo(f"--data.pretrain={train}", "--model.algorithm.ptx_coef=1")
        return getattr(self, kind)(train=train)
