"""DPO, IPO and KTO on log-ratios: worked by hand, against loops and autograd, in their limits, and in TRL 1.16."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.core import DPO, IPO, KTO, RankingLoss, response_labels

TIGHT = {"rtol": 0, "atol": 1e-12}
RANK = torch.tensor([[0, 1, -1, -1], [1, 0, 2, 1], [0, 0, -1, -1], [2, 1, 0, 3]])
H = 3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
PAIRED = [DPO(beta=0.3), DPO(beta=2.0, label_smoothing=0.2), IPO(beta=0.3)]
KL = torch.tensor(0.7, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def naive(loss, h, rank, kl=None):
    """One prompt in Python floats: the loss and its gradient at h."""
    places = [k for k in range(len(rank)) if rank[k] >= 0]
    value, gradient, b = 0.0, [0.0] * len(h), loss.beta
    if isinstance(loss, KTO):
        top, worst = 0, max(rank)
        good, bad = ([k for k in places if worst and rank[k] == end] for end in (top, worst))
        for k, sign in [(k, 1) for k in good] + [(k, -1) for k in bad]:
            weight = (loss.desirable if sign > 0 else loss.undesirable) / (len(good) + len(bad))
            s = sigmoid(sign * b * (h[k] - kl))
            value += weight * (1 - s)
            gradient[k] -= weight * s * (1 - s) * sign * b
        return value, gradient
    pairs = [(w, l) for w in places for l in places if rank[w] < rank[l]]  # noqa: E741
    for w, l in pairs:  # noqa: E741
        m = h[w] - h[l]
        if isinstance(loss, IPO):
            one, slope = (m - 0.5 / b) ** 2, 2 * (m - 0.5 / b)
        else:
            e = loss.label_smoothing
            one = -(1 - e) * math.log(sigmoid(b * m)) - e * math.log(sigmoid(-b * m))
            slope = b * (sigmoid(b * m) - 1 + e)
        value += one / len(pairs)
        gradient[w] += slope / len(pairs)
        gradient[l] -= slope / len(pairs)
    return value, gradient


@pytest.mark.parametrize("loss", [*PAIRED, KTO(beta=0.4, desirable=1.3, undesirable=0.6)], ids=repr)
def test_value_and_gradient_equal_a_loop(loss):
    h = H.clone().requires_grad_()
    found = loss(h, RANK, KL)
    (gradient,) = torch.autograd.grad(found.sum(), h)
    for b in range(len(H)):
        value, slope = naive(loss, H[b].tolist(), RANK[b].tolist(), float(KL))
        assert found[b].item() == pytest.approx(value, abs=1e-12)
        assert gradient[b].tolist() == pytest.approx(slope, abs=1e-12)
    assert loss.counts(RANK).tolist() == [True, True, False, True]
    # negative control: another β is another loss
    assert (replace(loss, beta=2 * loss.beta)(H, RANK, KL) - found).abs().max() > 1e-3


def test_hand_worked_values():
    h, rank = torch.tensor([[2.0, -1.0]], dtype=torch.float64), torch.tensor([[0, 1]])
    assert float(DPO(beta=0.5)(h, rank)) == pytest.approx(
        math.log(1 + math.exp(-1.5)), abs=1e-12
    )  # margin 3, β·3 = 1.5
    smooth = 0.9 * math.log(1 + math.exp(-1.5)) + 0.1 * math.log(1 + math.exp(1.5))
    assert float(DPO(beta=0.5, label_smoothing=0.1)(h, rank)) == pytest.approx(smooth, abs=1e-12)
    assert float(IPO(beta=0.5)(h, rank)) == pytest.approx(4.0, abs=1e-12)  # (3 − 1)²
    kto = (1 - sigmoid(0.5 * 1.5) + 1 - sigmoid(0.5 * 1.5)) / 2  # h − z is 1.5 and −1.5 at z = ½
    assert float(KTO(beta=0.5)(h, rank, torch.tensor(0.5, dtype=torch.float64))) == pytest.approx(kto, abs=1e-12)


def test_dpo_is_the_ranking_loss_of_the_implicit_reward():
    assert_close(DPO(beta=0.7)(H, RANK), RankingLoss()(0.7 * H, RANK), **TIGHT)
    assert (DPO(beta=0.7)(H, RANK) - RankingLoss()(H, RANK)).abs().max() > 0.01  # control: β left out


def test_small_beta_is_log_two_with_a_linear_pull():
    """β → 0: log 2 − β·m/2 + O(β²)."""
    beta, rank = 1e-4, torch.tensor([[0, 1]])
    h = H[:1, :2]
    margin = h[0, 0] - h[0, 1]
    assert float(DPO(beta=beta)(h, rank)) == pytest.approx(math.log(2) - beta * float(margin) / 2, abs=beta**2 * 50)
    assert abs(float(DPO(beta=1.0)(h, rank)) - math.log(2)) > 0.05


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.4])
def test_label_smoothing_moves_the_minimum_to_its_log_odds(epsilon):
    loss, rank = DPO(beta=0.5, label_smoothing=epsilon), torch.tensor([[0, 1]])
    best = math.log((1 - epsilon) / epsilon) / 0.5  # σ(β·m) = 1 − ε

    def slope(margin, of=loss):
        h = torch.tensor([[margin, 0.0]], dtype=torch.float64, requires_grad=True)
        return float(torch.autograd.grad(of(h, rank).sum(), h)[0][0, 0])

    assert slope(best) == pytest.approx(0.0, abs=1e-12)
    assert slope(best - 0.1) < 0 < slope(best + 0.1)
    assert slope(best, DPO(beta=0.5)) < -0.01  # control: without smoothing it goes on


def test_ipo_has_its_minimum_at_half_of_one_over_beta():
    for beta in (0.1, 0.5):
        h = torch.tensor([[1 / (2 * beta), 0.0]], dtype=torch.float64, requires_grad=True)
        loss = IPO(beta=beta)(h, torch.tensor([[0, 1]]))
        assert loss.item() == 0.0
        assert not torch.autograd.grad(loss.sum(), h)[0].any()
    assert IPO(beta=0.2)(h, torch.tensor([[0, 1]])).item() > 0.1


def test_labels_are_best_and_worst_and_those_of_lone_responses():
    labels = response_labels(RANK)
    assert labels.tolist() == [[1, -1, 0, 0], [0, 1, -1, 0], [0, 0, 0, 0], [0, 0, 1, -1]]
    assert response_labels(torch.tensor([[0], [1], [-1]])).tolist() == [[1], [-1], [0]]


def test_kto_on_lone_responses():
    h = torch.tensor([[1.2], [-0.4], [9.0]], dtype=torch.float64)
    rank = torch.tensor([[0], [1], [-1]])
    loss = KTO(beta=0.5, desirable=2.0, undesirable=3.0)
    expected = [2 * (1 - sigmoid(0.5 * 0.5)), 3 * (1 - sigmoid(0.5 * 1.1)), 0.0]
    assert loss(h, rank, KL).squeeze().tolist() == pytest.approx(expected, abs=1e-12)
    assert loss.counts(rank).tolist() == [True, True, False]


def test_kl_below_zero_counts_as_zero():
    below, zero = (KTO()(H, RANK, torch.tensor(z, dtype=torch.float64)) for z in (-3.0, 0.0))
    assert torch.equal(below, zero)
    assert not torch.equal(zero, KTO()(H, RANK, KL))


@pytest.mark.parametrize("loss", [*PAIRED, KTO()], ids=repr)
def test_absent_responses_have_no_influence(loss):
    moved = torch.where(RANK < 0, math.nan, H).requires_grad_()
    found = loss(moved, RANK, KL)
    assert torch.equal(found, loss(H, RANK, KL))
    assert torch.autograd.grad(found.sum(), moved)[0].isfinite().all()


@pytest.mark.parametrize("loss", PAIRED, ids=repr)
def test_lone_responses_are_refused_by_pairwise_losses(loss):
    with pytest.raises(ValueError, match="compares the responses to a prompt"):
        loss.counts(torch.tensor([[0], [1]]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DPO(beta=0.0), "`beta`"),
        (lambda: IPO(beta=-1.0), "`beta`"),
        (lambda: KTO(beta=math.inf), "`beta`"),
        (lambda: DPO(label_smoothing=0.5), "`label_smoothing`"),
        (lambda: DPO(label_smoothing=-0.1), "`label_smoothing`"),
        (lambda: KTO(desirable=-1.0), "`desirable`"),
        (lambda: KTO(undesirable=-1.0), "`undesirable`"),
        (lambda: KTO()(H, RANK), "KTO needs `kl`"),
    ],
)
def test_wrong_numbers_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# TRL 1.16's own trainers on the same tensors

N, T = 6, 5  # pairs and tokens
LENGTHS = torch.tensor([5, 3, 1, 4, 2, 5, 2, 5, 4, 3, 1, 4])  # of chosen, then of rejected
NUMBERS = torch.randn(4, 2 * N, T, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
MASK = torch.arange(T) < LENGTHS.unsqueeze(1)
POLICY, REFERENCE, OF_KL, REFERENCE_OF_KL = torch.where(MASK, -NUMBERS.abs(), 0.0)


def installed_trl():
    trl = pytest.importorskip("trl", reason="the parity is with the installed TRL")
    if not trl.__version__.startswith("1.16"):
        pytest.skip(f"the formulas are those of TRL 1.16, here is {trl.__version__}")
    return trl


class Accelerator:
    device = torch.device("cpu")

    def gather_for_metrics(self, x):
        return x

    gather = gather_for_metrics


def outputs_of(logprobs):
    """What TRL's fused head returns; all but the log-probs is only logged."""
    zeros = torch.zeros_like(logprobs)
    return SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trl_inputs():
    completion = torch.cat([torch.zeros(2 * N, 1, dtype=torch.bool), MASK], 1).long()
    return {"input_ids": completion, "attention_mask": completion, "completion_mask": completion}


def dpo_of_trl(loss_type: str, **options):
    """Mean loss of TRL's DPOTrainer and its gradient at log π_θ of the tokens."""
    trl = installed_trl()
    logprobs = POLICY.clone().requires_grad_()
    output = outputs_of(logprobs)
    this = SimpleNamespace(
        **({"beta": 0.1} | options),
        accelerator=Accelerator(),
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    chosen, rejected = REFERENCE.sum(1).chunk(2)
    inputs = trl_inputs() | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = trl.DPOTrainer._compute_loss(this, lambda **_: output, inputs, False)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


def kto_of_trl(**options):
    """The same of TRL's KTOTrainer; the first half of the responses is good."""
    trl = installed_trl()
    logprobs = POLICY.clone().requires_grad_()
    output = outputs_of(logprobs)
    this = SimpleNamespace(
        **({"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0} | options),
        accelerator=Accelerator(),
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        _compute_kl_logps=lambda *_: OF_KL.sum(1),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    label = torch.arange(2 * N) < N
    inputs = trl_inputs() | {
        "label": label,
        "ref_logps": REFERENCE.sum(1),
        "ref_KL_logps": REFERENCE_OF_KL.sum(1),
    }
    loss = trl.KTOTrainer._compute_loss(this, lambda **_: output, inputs, False)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


def ours(loss, *, per_token: bool = False):
    logprobs = POLICY.clone().requires_grad_()
    ratios = torch.where(MASK, logprobs - REFERENCE, 0.0).sum(1)
    if per_token:
        ratios = ratios / LENGTHS
    if loss.needs_kl:
        rank = (torch.arange(2 * N) >= N).long().unsqueeze(1)
        value = loss(ratios.unsqueeze(1), rank, (OF_KL - REFERENCE_OF_KL).sum(1).mean()).mean()
    else:
        value = loss(torch.stack(ratios.chunk(2), 1), torch.tensor([[0, 1]]).expand(N, 2)).mean()
    return value.detach(), torch.autograd.grad(value, logprobs)[0]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert_close(one, torch.where(MASK, other, 0.0) if other.ndim else other, **TIGHT)


def differ(found, expected):
    assert (found[1] - expected[1]).abs().max() > 1e-4


@pytest.mark.parametrize("options", [{}, {"beta": 0.5}])
def test_dpo_is_that_of_trl(options):
    """At ε = 0: TRL 1.16 has no conservative DPO any more."""
    same(ours(DPO(**options)), dpo_of_trl("sigmoid", **options))
    differ(ours(DPO(beta=0.3)), dpo_of_trl("sigmoid", **options))


def test_ipo_of_mean_log_ratios_is_that_of_trl():
    same(ours(IPO(beta=0.4), per_token=True), dpo_of_trl("ipo", beta=0.4))
    differ(ours(IPO(beta=0.4)), dpo_of_trl("ipo", beta=0.4))  # the paper's sum is another loss


@pytest.mark.parametrize("options", [{}, {"beta": 0.5, "desirable": 1.2, "undesirable": 0.7}])
def test_kto_is_that_of_trl(options):
    weights = {f"{name}_weight": options[name] for name in ("desirable", "undesirable") if name in options}
    weights |= {"beta": options["beta"]} if "beta" in options else {}
    same(ours(KTO(**options)), kto_of_trl(**weights))
    differ(ours(KTO(beta=0.3)), kto_of_trl(**weights))
