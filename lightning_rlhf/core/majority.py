"""Unbiased estimate of a majority vote among k of n responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from math import comb


def majority_at_k(answers: Sequence[int | None], solved: Sequence[float], *, k: int) -> float:
    """Expected score of the answer that most of k responses give, over all choices of k out of n (Wang et al. 2022).

    Answers that are given equally often share the vote. A response without an answer takes a place and has no vote.

    Args:
        answers: of each response, equal numbers for equal answers; None for none.
        solved: score of each response; an answer's is the mean of its responses'.
        k: responses that vote, 1 ≤ k ≤ n.

    Returns:
        the expectation, 0 where nothing was voted for.

    Raises:
        ValueError: the lengths differ, or `k` is out of range.
    """
    if len(answers) != len(solved) or not 1 <= k <= len(answers):
        raise ValueError(
            f"`k` must be from 1 to the number of responses, which need one answer and one score each: got k={k}, "
            f"{len(answers)} answers and {len(solved)} scores"
        )
    counts = Counter(answer for answer in answers if answer is not None)
    silent = len(answers) - sum(counts.values())
    sizes = tuple(sorted(counts.values()))
    total = 0.0
    for answer, count in counts.items():
        score = sum(value for given, value in zip(answers, solved, strict=True) if given == answer) / count
        total += score * _wins(count, sizes, silent, k) if score else 0.0
    return total / comb(len(answers), k)


@cache
def _wins(count: int, sizes: tuple[int, ...], silent: int, k: int) -> float:
    """Ways to choose k responses in which an answer given `count` times wins, where equals share a win."""
    others = list(sizes)
    others.remove(count)
    wins = 0.0
    for votes in range(1, min(count, k) + 1):
        ways = {(0, 0): 1}  # by responses chosen of the other answers, and answers with as many votes
        for size in others:
            following: dict[tuple[int, int], int] = {}
            for (chosen, equal), number in ways.items():
                for more in range(min(size, votes, k - votes - chosen) + 1):
                    place = (chosen + more, equal + (more == votes))
                    following[place] = following.get(place, 0) + number * comb(size, more)
            ways = following
        for (chosen, equal), number in ways.items():
            wins += comb(count, votes) * number * comb(silent, k - votes - chosen) / (1 + equal)
    return wins
