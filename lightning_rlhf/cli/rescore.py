"""`lightning-rlhf rescore LOG --reward … --output FILE`: a rollout log's responses, scored by another reward."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice
from os.path import expanduser
from pathlib import Path
from typing import Any, TextIO

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.cli.comparison import Comparison
from lightning_rlhf.cli.consent import objection
from lightning_rlhf.cli.parser import Parser
from lightning_rlhf.data.records import Located
from lightning_rlhf.data.sources import stream_records
from lightning_rlhf.rewards import Reward, as_reward
from lightning_rlhf.text import Encoder, load_tokenizer
from lightning_rlhf.types import Rollout

NEEDED = {"prompt": (str, list), "tokens": list, "ended": bool, "raw_score": (int, float), "iteration": int}
"""Columns of `rollouts.jsonl` that are read and their types."""
WRITERS = ("policy", "environment")
"""Roles of the turns of an episode."""


def main(args: Sequence[str]) -> None:
    """Write the log's lines with `rescored` and print a comparison of the two scores.

    Raises:
        SystemExit: the arguments are not valid; the reason is on stderr.
        ValueError: a line of the log is not what `RolloutLog` writes.
    """
    parser = _parser()
    given = _with_folder(args)
    config = parser.parse_args(given)
    refusal = objection(config.as_dict(), given)
    if refusal is not None:
        parser.error(refusal)
    chosen = parser.instantiate_classes(config)
    tokenizer = None if chosen.tokenizer is None else load_tokenizer(chosen.tokenizer)
    rescorer, comparison = Rescorer(as_reward(chosen.reward), tokenizer, chosen.prompt_role), Comparison()
    records = stream_records(chosen.log)
    with _whole(Path(expanduser(chosen.output))) as file:
        while batch := list(islice(records, chosen.batch_size)):
            scores = rescorer(batch)
            for record, score in zip(batch, scores, strict=True):
                file.write(json.dumps(dict(record.row) | {"rescored": score}) + "\n")
                comparison.add(record.row["raw_score"], score, group=record.row["iteration"])
        if not comparison.count:
            raise ValueError(f"{chosen.log} holds no response")
    print(comparison.report(chosen.output))


class Rescorer:
    """Scores lines of a rollout log.

    Args:
        reward: any.
        tokenizer: of the policy that wrote the log, for rewards on token ids; None: text alone is known.
        prompt_role: as in the data that the policy was trained on.
    """

    def __init__(
        self, reward: Reward, tokenizer: PreTrainedTokenizerBase | None = None, prompt_role: str | None = None
    ) -> None:
        self.reward, self.texts = reward, LoggedTexts() if tokenizer is None else None
        self.encoder = None if tokenizer is None else Encoder(tokenizer, prompt_role=prompt_role)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reward.prepare(self.texts or tokenizer)  # type: ignore[arg-type]
        for network in reward.networks():
            network.to(self.device)

    @torch.no_grad()
    def __call__(self, records: Sequence[Located]) -> list[float]:
        """Score lines of the log.

        Raises:
            ValueError: a line is not what `RolloutLog` writes, or the reward returned something else than numbers.
        """
        for record in records:
            _check(record, NEEDED if self.encoder else NEEDED | {"response": str})
        lines = [record.row for record in records]
        if self.texts is not None:
            self.texts.known = dict(map(_last_text, lines))
        rows = [{"prompt": line["prompt"]} | (line.get("row") or {}) for line in lines]
        scores = self.reward.scored(self._rollout(lines), rows)
        return scores.complete(rows, source=type(self.reward).__name__).tolist()

    def _rollout(self, lines: Sequence[Mapping[str, Any]]) -> Rollout:
        """Rebuild the rollout with zero log-probs (no reward reads them); without tokenizer it has no prompt tokens."""
        prompts = [list(self.encoder.prompt(line["prompt"])) if self.encoder else [] for line in lines]
        pad = self.encoder.pad if self.encoder else 0
        responses = [line["tokens"] for line in lines]
        before, width = max(map(len, prompts)), max(1, *map(len, responses))
        rows = [
            [pad] * (before - len(p)) + p + r + [pad] * (width - len(r))
            for p, r in zip(prompts, responses, strict=True)
        ]
        own, given = (_padded(part, width) for part in zip(*map(_turns, lines), strict=True))
        place = torch.arange(before + width)
        first = torch.tensor([before - len(p) for p in prompts]).unsqueeze(1)
        last = torch.tensor([before + len(r) for r in responses]).unsqueeze(1)
        real = ((place >= first) & (place < last)).to(self.device)
        nothing = torch.zeros(len(lines), width, device=self.device)
        has_turns = any("turns" in line for line in lines)
        failed = torch.tensor([bool(line.get("failed")) for line in lines], device=self.device)
        return Rollout(
            tokens=torch.tensor(rows, dtype=torch.long, device=self.device),
            attention_mask=real,
            response_mask=real[:, before:] & own.bool().to(self.device),
            ended=torch.tensor([line["ended"] for line in lines], device=self.device),
            prompt_index=torch.arange(len(lines), device=self.device),
            logprobs=nothing,
            sampler_logprobs=nothing,
            ref_logprobs=nothing,
            entropy=nothing,
            values=nothing,
            **({"rewards": given.to(self.device), "failed": failed} if has_turns else {}),
        )


def _turns(line: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return for each token of a response whether the policy wrote it, and its reward."""
    if "turns" not in line:
        return [1.0] * len(line["tokens"]), [0.0] * len(line["tokens"])
    own: list[float] = []
    rewards: list[float] = []
    for turn in line["turns"]:
        own += [float(turn["role"] == "policy")] * turn["tokens"]
        rewards += [0.0] * (turn["tokens"] - 1) + [turn.get("reward", 0.0)]
    return own, rewards


def _padded(rows: Sequence[list[float]], width: int) -> Tensor:
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows])


def _last_text(line: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    """Return the ids and the text that a reward reads: of the policy's last turn, or of all."""
    if "turns" not in line:
        return tuple(line["tokens"]), line["response"]
    stops = list(accumulate(turn["tokens"] for turn in line["turns"]))
    spoken = [pair for pair in zip(line["turns"], stops, strict=True) if pair[0]["role"] == "policy"]
    if not spoken:
        return (), ""
    turn, stop = spoken[-1]
    return tuple(line["tokens"][stop - turn["tokens"] : stop]), turn["text"]


class LoggedTexts:
    """Stand-in for the policy's tokenizer that decodes responses by the texts in the log.

    Attributes:
        known: texts by their token ids.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], str] = {}

    def batch_decode(self, sequences: Sequence[Sequence[int]], **_: Any) -> list[str]:
        """Look up the logged texts of token ids."""
        return [self.known[tuple(ids)] for ids in sequences]

    def get_vocab(self) -> dict[str, int]:
        """Return an empty vocabulary, so that a reward model reads the texts with its own tokenizer."""
        return {}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the reward asks the policy's tokenizer for `{name}`: name it with --tokenizer FOLDER")


def _parser() -> Parser:
    parser = Parser(prog="lightning-rlhf rescore", description=__doc__, allow_abbrev=False)
    parser.add_argument("log", type=str, help="a rollouts.jsonl, or .gz of one")
    parser.add_argument(
        "--reward",
        type=Reward | Callable[..., Any],
        required=True,
        help="a folder or checkpoint of a reward model, a dotted path to a function, or a class with its arguments",
    )
    parser.add_argument("--output", type=str, required=True, help="the log's lines with `rescored`; written whole")
    parser.add_argument("--batch_size", type=PositiveInt, default=64, help="responses scored at a time")
    parser.add_argument("--tokenizer", type=str | None, default=None, help="the policy's, for rewards on token ids")
    parser.add_argument(
        "--prompt_role", type=str | None, default=None, help="as in the training data, with --tokenizer"
    )
    return parser


def _with_folder(args: Sequence[str]) -> list[str]:
    """Expand a `--reward` that is an existing path to a `LearnedReward` of it."""
    arguments = list(args)
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--reward":
            value = value if equals else "".join(arguments[place + 1 : place + 2])
            if Path(expanduser(value)).exists():
                arguments[place : place + (1 if equals else 2)] = ["--reward=LearnedReward", f"--reward.path={value}"]
                break
    return arguments


def _check(record: Located, needed: dict[str, Any]) -> None:
    """Raise ValueError if a column is missing or of another type."""
    for name, kinds in needed.items():
        value = record.row.get(name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise ValueError(
                f"{record.where}: `{name}` is {value!r:.80}, not what RolloutLog writes there: give a rollouts.jsonl"
            )
    tokens, turns = record.row["tokens"], record.row.get("turns")
    if turns is not None and not _are_turns(turns, len(tokens)):
        raise ValueError(f"{record.where}: `turns` is {turns!r:.80}, not what RolloutLog writes there")
    if not (tokens or record.row.get("failed")) or not all(type(token) is int and token >= 0 for token in tokens):
        raise ValueError(f"{record.where}: `tokens` must be at least one token id: got {record.row['tokens']!r:.80}")


def _are_turns(turns: Any, count: int) -> bool:
    """Return True if `turns` has the form that the log gives them, for so many tokens."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return False
    numbers = [turn.get("tokens") for turn in turns]
    if not all(type(number) is int and number > 0 for number in numbers) or sum(numbers) != count:
        return False
    return all(isinstance(turn.get("text"), str | None) and turn.get("role") in WRITERS for turn in turns)


@contextmanager
def _whole(path: Path) -> Iterator[TextIO]:
    """Open a file that is renamed to `path` once all of it is written."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with part.open("w", encoding="ascii", newline="\n") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
