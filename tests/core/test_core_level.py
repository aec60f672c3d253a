import torch
from torch.testing import assert_close

from lightning_rlhf.core import SequenceLevel, TokenLevel

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}
RESPONSE = torch.tensor([[True, True, True], [True, False, False]])


def test_sequence_level_sums_the_tokens_of_the_response(float64):
    x = float64([[0.1, 0.2, 0.4], [1.5, NAN, 7.0]])
    assert_close(SequenceLevel().total(x, RESPONSE), float64([[0.7], [1.5]]), **TIGHT)


def test_token_level_keeps_tokens_and_zeroes_the_rest(float64):
    x = float64([[0.1, 0.2, 0.4], [1.5, NAN, 7.0]])
    assert torch.equal(TokenLevel().total(x, RESPONSE), float64([[0.1, 0.2, 0.4], [1.5, 0.0, 0.0]]))
    assert torch.equal(TokenLevel().state_value(x, RESPONSE), float64([[0.1, 0.2, 0.4], [1.5, 0.0, 0.0]]))


def test_masks_say_which_actions_count():
    assert torch.equal(TokenLevel().mask(RESPONSE), RESPONSE)
    response = torch.cat([RESPONSE, torch.zeros(1, 3, dtype=torch.bool)])
    assert torch.equal(SequenceLevel().mask(response), torch.tensor([[True], [True], [False]]))


def test_sequence_state_value_is_that_of_the_prompts_last_token(float64):
    # values (B, R) start before the first response token; a mean over tokens would be 2 and 5/3
    values = float64([[1.0, 2.0, 3.0], [5.0, 0.0, NAN]])
    assert torch.equal(SequenceLevel().state_value(values, RESPONSE), float64([[1.0], [5.0]]))


def test_log_ratio_is_new_less_old(float64):
    new, old = float64([[-1.0, -2.0, -3.0], [-0.5, 0.0, NAN]]), float64([[-1.5, -2.5, -2.0], [-1.0, NAN, 0.0]])
    # tokens: 0.5, 0.5, −1 | 0.5; sequences: 0 and 0.5
    assert_close(TokenLevel().log_ratio(new, old, RESPONSE), float64([[0.5, 0.5, -1.0], [0.5, 0.0, 0.0]]), **TIGHT)
    assert_close(SequenceLevel().log_ratio(new, old, RESPONSE), float64([[0.0], [0.5]]), **TIGHT)
    # negative control: the sign
    assert SequenceLevel().log_ratio(old, new, RESPONSE)[1, 0] == -0.5


def test_sequence_ratio_is_the_product_of_the_token_ratios(float64):
    # ten tokens of ratio 1.05: 1.05¹⁰ = 1.62889..., outside the clip bounds although no token is
    new = float64([[1.05] * 10]).log()
    everything = torch.ones(1, 10, dtype=torch.bool)
    old = torch.zeros_like(new)
    assert_close(SequenceLevel().log_ratio(new, old, everything).exp(), float64([[1.628894626777442]]), **TIGHT)
    assert_close(TokenLevel().log_ratio(new, old, everything).exp(), float64([[1.05] * 10]), **TIGHT)


def test_masked_tokens_get_no_gradient(float64):
    for level in (TokenLevel(), SequenceLevel()):
        new = float64([[-1.0, -2.0, -3.0], [-0.5, NAN, NAN]], requires_grad=True)
        level.log_ratio(new, torch.zeros_like(new), RESPONSE).sum().backward()
        assert torch.equal(new.grad, RESPONSE.double())
