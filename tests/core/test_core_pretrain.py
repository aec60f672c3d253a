import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.core import next_token_loss

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}
TARGET = torch.tensor([[False, True, True, False], [False, False, True, False]])


def test_next_token_loss_equals_hand_value(float64):
    # column t of `logprobs` predicts token t + 1: those that count are −1, −2 | −5; (1 + 2 + 5)/3
    logprobs = float64([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    assert_close(next_token_loss(logprobs, TARGET, count=3), float64(8 / 3), **TIGHT)
    assert_close(next_token_loss(logprobs, TARGET, count=torch.tensor(3)), float64(8 / 3), **TIGHT)
    # negative control: with the mask not shifted, −2, −3 | −6 would count
    assert abs(8 / 3 - 11 / 3) > 0.5


def test_next_token_loss_gradient_is_minus_one_over_count_where_it_counts(float64):
    logprobs = float64([[-1.0, -2.0, NAN], [NAN, -5.0, -6.0]], requires_grad=True)
    next_token_loss(logprobs, TARGET, count=4).backward()
    assert torch.equal(logprobs.grad, float64([[-0.25, -0.25, 0.0], [0.0, -0.25, 0.0]]))


def test_next_token_loss_of_microbatches_adds_up_to_the_whole(float64):
    logprobs = float64([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    parts = [next_token_loss(logprobs[i : i + 1], TARGET[i : i + 1], count=3) for i in range(2)]
    assert_close(sum(parts), float64(8 / 3), **TIGHT)
    # negative control: counts of each row alone give (1.5 + 5)/2 = 3.25
    alone = [next_token_loss(logprobs[i : i + 1], TARGET[i : i + 1], count=int(TARGET[i].sum())) for i in range(2)]
    assert_close(sum(alone) / 2, float64(3.25), **TIGHT)


def test_next_token_loss_without_targets_is_zero(float64):
    nothing = torch.zeros_like(TARGET)
    logprobs = float64([[NAN] * 3] * 2, requires_grad=True)
    loss = next_token_loss(logprobs, nothing, count=0)
    loss.backward()
    assert loss == 0
    assert logprobs.grad.eq(0).all()


def test_next_token_loss_refuses_a_target_that_nothing_predicts():
    target = TARGET.clone()
    target[1, 0] = True
    with pytest.raises(ValueError, match="`target` counts the first token of a row, which nothing predicts"):
        next_token_loss(torch.zeros(2, 3), target, count=4)


def test_next_token_loss_refuses_logprobs_that_are_not_one_shorter():
    with pytest.raises(ValueError, match=r"`logprobs` must be .*"):
        next_token_loss(torch.zeros(2, 4), TARGET, count=3)
