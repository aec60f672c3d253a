"""What an environment gives is read, or refused with what it should be."""

from __future__ import annotations

import re

import pytest
import torch

from lightning_rlhf.environments.environment import Done, Reply, as_opening, as_reply

HALF = "half of a surrogate pair, '\\\\ud83d' after 'a smile '"


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("go on", Reply([{"role": "user", "content": "go on"}])),
        ([{"role": "tool", "content": "6"}], Reply([{"role": "tool", "content": "6"}])),
        (Reply("go on", 1), Reply([{"role": "user", "content": "go on"}], 1.0)),
        (Done(), Done(0.0)),
        (Done(torch.tensor(0.5)), Done(0.5)),
        (Done(True), Done(1.0)),
    ],
)
def test_answer_is_read(answer, read):
    assert as_reply(answer) == read


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (None, TypeError, "must answer with a text, messages .* a Reply or a Done: got NoneType"),
        (3, TypeError, "got int: 3"),
        ([], TypeError, "got list"),
        ([{"role": "user"}], TypeError, re.escape("[{'role': 'user'}]")),
        (Done(None), TypeError, r"must give a number as the reward: got None; for none leave it out, Done\(\)"),
        (Reply("on", "much"), TypeError, "got 'much'"),
        (Done(float("nan")), ValueError, "finite reward: got nan"),
        ("a smile \ud83d", ValueError, HALF),
        (Reply([{"role": "tool", "content": "a smile \ud83d"}]), ValueError, HALF),
    ],
)
def test_other_answer_is_refused(answer, error, said):
    with pytest.raises(error, match=said):
        as_reply(answer)


def test_opening_is_a_text_or_messages():
    assert as_opening(None) == ""
    assert as_opening("door") == "door"
    assert as_opening([{"role": "user", "content": "door"}]) == [{"role": "user", "content": "door"}]
    with pytest.raises(ValueError, match=HALF):
        as_opening("a smile \ud83d")
    with pytest.raises(TypeError, match="got int: 3"):
        as_opening(3)
