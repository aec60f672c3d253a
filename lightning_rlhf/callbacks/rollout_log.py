"""Log of all training responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch import Trainer

from lightning_rlhf.callbacks.run_file import FileCallback, Keyed, RunFile
from lightning_rlhf.rewards.text import texts_of
from lightning_rlhf.types import Outcome, Turn


class RolloutLog(FileCallback):
    """Writes `rollouts.jsonl`: one training response a line, in the order of the prompts whatever the processes.

    `pandas.read_json("rollouts.jsonl", lines=True)` reads it, and `lightning-rlhf rescore` scores it by another reward.
    After a resume the lines of rollouts that the checkpoint does not know are cut off first. A line has `iteration`
    (rollouts before it), `episode` (responses before it), `prompt`, `response`, `tokens`, `length`, `ended`,
    `raw_score` (before shaping), `score`, `score/NAME` (parts), `kl`, `entropy`, `advantage` and `row`, the other
    columns of the prompt's record. With an environment it also has `failed` and `turns`, each with `role` (`policy` or
    `environment`), `text`, `tokens` (their number) and the `reward` of the policy's. In the stages without rollouts it
    does nothing.

    Args:
        folder: None is the trainer's `default_root_dir`.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.file = RunFile(folder, "rollouts.jsonl")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open the log file."""
        if hasattr(pl_module, "outcome"):
            self.file.begin(trainer, before=pl_module.iteration)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Append the rollout to the log."""
        if self.file.path is None:
            return
        records = self.file.gathered(trainer, _lines(trainer, pl_module, pl_module.outcome))
        if trainer.is_global_zero:
            self.file.append(records)


def _lines(trainer: Trainer, module: Any, outcome: Outcome) -> Iterator[Keyed]:
    """Records of this process; a key is the response's index in the rollout of all processes."""
    world = trainer.world_size
    samples = module.samples_per_prompt
    tokens = outcome.tokens()
    before, groups = module.episodes - world * len(outcome.rollout), outcome.rollout.prompt_index.tolist()
    said = zip(outcome.rows, responses(module, tokens), tokens, outcome.numbers(), turns(module, outcome), strict=True)
    for i, (row, response, ids, numbers, episode) in enumerate(said):
        place = (groups[i] * world + trainer.global_rank) * samples + i % samples
        opening = {"iteration": module.iteration - 1, "episode": before + place}
        text = {"prompt": row.get("prompt"), "response": response, "tokens": ids}
        rest = {name: value for name, value in row.items() if name != "prompt"}
        yield (place,), opening | text | numbers | episode | {"row": rest}


def turns(module: Any, outcome: Outcome) -> list[dict[str, Any]]:
    """Describe the turns of each episode for a log; nothing of a single response."""
    if outcome.rollout.failed is None:
        return [{} for _ in outcome.rows]
    episodes, failed = outcome.turns(), outcome.rollout.failed.tolist()
    texts = iter(responses(module, [turn.tokens for episode in episodes for turn in episode]))
    return [
        {"failed": failure, "turns": [_turn(turn, next(texts)) for turn in episode]}
        for episode, failure in zip(episodes, failed, strict=True)
    ]


def _turn(turn: Turn, text: str | None) -> dict[str, Any]:
    role = "policy" if turn.is_policy else "environment"
    described = {"role": role, "text": text, "tokens": len(turn.tokens)}
    return described | ({"reward": turn.reward} if turn.is_policy else {})


def responses(module: Any, tokens: list[list[int]]) -> Sequence[str | None]:
    """Decode responses to the texts that a reward reads; each is None if the module has no tokenizer."""
    if module.tokenizer is None:
        return [None] * len(tokens)
    return texts_of(tokens, module.tokenizer)
