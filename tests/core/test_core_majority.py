"""Majority vote among k of n responses against all choices one by one."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from lightning_rlhf.core import majority_at_k


def by_enumeration(answers, solved, k) -> float:
    """Mean over all choices of k; what is given most often wins, equals share."""
    values = {a: [s for b, s in zip(answers, solved, strict=True) if b == a] for a in answers if a is not None}
    scores = {answer: sum(found) / len(found) for answer, found in values.items()}
    total, number = 0.0, 0
    for chosen in itertools.combinations(range(len(answers)), k):
        votes = Counter(answers[i] for i in chosen if answers[i] is not None)
        most = max(votes.values(), default=0)
        winners = [answer for answer, count in votes.items() if count == most]
        total += sum(scores[answer] for answer in winners) / len(winners) if winners else 0.0
        number += 1
    return total / number


@pytest.mark.parametrize("seed", range(30))
def test_vote_is_the_mean_over_all_choices(seed):
    drawn = random.Random(seed)
    n = drawn.randint(1, 8)
    answers = [drawn.choice([0, 0, 1, 2, 3, None]) for _ in range(n)]
    right = drawn.randint(0, 3)
    solved = [float(answer == right) for answer in answers]
    for k in range(1, n + 1):
        assert majority_at_k(answers, solved, k=k) == pytest.approx(by_enumeration(answers, solved, k), abs=1e-12)


def test_one_vote_is_the_share_of_right_responses():
    assert majority_at_k([0, 1, 1, None], [1.0, 0.0, 0.0, 0.0], k=1) == pytest.approx(0.25)


def test_more_votes_help_what_most_believe():
    answers, solved = [0] * 5 + [1, 2, 3], [1.0] * 5 + [0.0] * 3
    walked = [majority_at_k(answers, solved, k=k) for k in (1, 3, 5, 8)]
    assert walked == sorted(walked)
    assert walked[-1] == 1.0
    wrong = [majority_at_k(answers, [1.0 - s for s in solved], k=k) for k in (1, 3, 8)]
    assert wrong == sorted(wrong, reverse=True)


def test_equal_answers_are_many():
    """64 responses, 32 votes: as fast as it is needed once per prompt."""
    answers = [i % 9 for i in range(64)]
    assert 0 < majority_at_k(answers, [float(a == 0) for a in answers], k=32) < 1


@pytest.mark.parametrize("k", [0, 4])
def test_impossible_votes_are_refused(k):
    with pytest.raises(ValueError, match="`k`"):
        majority_at_k([0, 1, 2], [1.0, 0.0, 0.0], k=k)
