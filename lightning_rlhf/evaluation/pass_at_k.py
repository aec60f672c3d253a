"""Solved prompts among k responses of the policy: one of them right, or the one that most agree on."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation

import torch

from lightning_rlhf.core import expected_best, majority_at_k, standard_error
from lightning_rlhf.core.checks import check_finite, check_positive
from lightning_rlhf.evaluation.evaluator import Answers, Columns, Evaluator
from lightning_rlhf.rewards.patterns import last_group
from lightning_rlhf.rewards.text import decoded
from lightning_rlhf.rewards.verifiable import answer_pattern


@dataclass(frozen=True, kw_only=True)
class PassAtK(Evaluator):
    """Share of prompts that one of k responses of the policy solves: `pass_at_4`, with its standard error.

    Of n responses, c of them right, it is 1 − C(n − c, k)/C(n, k): the unbiased estimate (Chen et al. 2021, 2107.03374,
    eq. 1). Scores are taken before shaping. `pass_at_1` has less noise than `eval/reward`, which is of one response.
    """

    k: tuple[int, ...] = (1, 4)
    """Numbers of responses, ≥ 1."""
    samples: int | None = None
    """n, responses drawn to each prompt, at least the largest k; None is that."""
    solved: float = 1.0
    """Score from which on a response is right, reward units."""
    name: str = "pass_at"
    """Prefix of the logged names."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def policy_samples(self) -> int:
        """Number of responses of the policy to each prompt."""
        return self.samples or self.k[-1]

    def of_answers(self, answers: Answers) -> Columns:
        """Return which responses are right, (B, n)."""
        return {"solved": (answers.several_scores[:, : self.policy_samples] >= self.solved).double()}

    def conclude(self, notes: Columns) -> dict[str, float]:
        """Compute pass@k over all prompts."""
        of_prompts = {k: expected_best(notes["solved"], n=k) for k in self.k}
        means = {f"{self.name}_{k}": float(values.mean()) for k, values in of_prompts.items()}
        return means | {f"{self.name}_{k}_se": standard_error(values) for k, values in of_prompts.items()}


@dataclass(frozen=True, kw_only=True)
class MajorityAtK(Evaluator):
    """Share of prompts that the answer solves which most of k responses give: `majority_at_4`, with its standard error.

    (Self-consistency; Wang et al. 2022, 2203.11171.) The mean over all choices of k out of n responses; answers given
    equally often share the vote (`core.majority_at_k`). Scores are taken before shaping.
    """

    k: tuple[int, ...] = (4,)
    """Numbers of responses, ≥ 1."""
    samples: int | None = None
    """n, responses drawn to each prompt, at least the largest k; None is that."""
    solved: float = 1.0
    """Score from which on a response is right, reward units."""
    extract: str = "last_number"
    """Part of a response that is its answer: `whole`, `last_number`, `answer_tag` for `<answer>…</answer>`, or a
    regular expression whose last match has it in the first group. Numbers of equal value are one answer."""
    name: str = "majority_at"
    """Prefix of the logged names."""
    _pattern: object = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "_pattern", answer_pattern(self.extract))

    @property
    def policy_samples(self) -> int:
        """Number of responses of the policy to each prompt."""
        return self.samples or self.k[-1]

    def of_answers(self, answers: Answers) -> Columns:
        """Return which responses are right and the number of each response's answer, (B, n) each.

        −1 stands for no answer.

        Raises:
            ValueError: there is no tokenizer.
        """
        if answers.tokenizer is None or answers.several is None:
            raise ValueError("`MajorityAtK` reads text, but there is no tokenizer: pass PPOModule(tokenizer=...)")
        n = self.policy_samples
        texts = decoded(answers.several, answers.tokenizer)
        given = [last_group(self._pattern, text) for text in texts]  # type: ignore[arg-type]
        drawn = len(texts) // len(answers.scores)
        rows = [given[i * drawn : i * drawn + n] for i in range(len(answers.scores))]
        solved = (answers.several_scores[:, :n] >= self.solved).double()
        return {"solved": solved, "answers": torch.tensor([_numbered(row) for row in rows]).to(solved)}

    def conclude(self, notes: Columns) -> dict[str, float]:
        """Compute majority@k over all prompts."""
        rows = list(zip(notes["answers"].tolist(), notes["solved"].tolist(), strict=True))
        metrics: dict[str, float] = {}
        for k in self.k:
            values = [
                majority_at_k([None if number < 0 else int(number) for number in answers], solved, k=k)
                for answers, solved in rows
            ]
            of_prompts = torch.tensor(values, dtype=torch.float64)
            metrics[f"{self.name}_{k}"] = float(of_prompts.mean())
            metrics[f"{self.name}_{k}_se"] = standard_error(of_prompts)
        return metrics


def _check(evaluator: PassAtK | MajorityAtK) -> None:
    """Sort k and raise ValueError if it is empty or a number is out of range."""
    object.__setattr__(evaluator, "k", tuple(sorted(set(evaluator.k))))
    if not evaluator.k:
        raise ValueError("`k` must hold at least one number of responses: got none")
    check_positive(k=evaluator.k[0])
    check_finite(solved=evaluator.solved)
    if evaluator.samples is not None and evaluator.samples < evaluator.k[-1]:
        raise ValueError(f"`samples` must be at least the largest `k`, {evaluator.k[-1]}: got {evaluator.samples}")


def _numbered(given: list[str | None]) -> list[int]:
    """Number the different answers of one prompt's responses; −1 for none."""
    known: dict[object, int] = {}
    return [-1 if text is None else known.setdefault(_value(text), len(known)) for text in given]


def _value(text: str) -> object:
    """Return what equal answers share: a number's value, or the text without surrounding space."""
    try:
        return Decimal(text.strip().replace(",", "")).normalize()
    except InvalidOperation:
        return text.strip()
