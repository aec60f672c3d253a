"""Losses and gradients of TRL 1.16's own `GRPOTrainer._compute_loss` on the same tensors, and of nothing else."""

import inspect
import textwrap
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.core import (
    K3,
    LUSPO,
    SAPO,
    Algorithm,
    Clip,
    EntropyBonus,
    GroupAdvantage,
    KLInLoss,
    MaskTruncated,
    OffPolicyMask,
    PerReward,
    SAPOMethod,
    SeqMeanTokenSum,
    TokenLevel,
    TokenMean,
    TopEntropy,
    VESPOMethod,
    local,
)
from lightning_rlhf.core.vocabulary import VocabularySums
from lightning_rlhf.types import Rollout

TIGHT = {"rtol": 0, "atol": 1e-12}
B, R, BETA = 8, 6, 0.3
LENGTHS = torch.tensor([6, 2, 5, 1, 6, 3, 4, 6])
RESPONSE = torch.arange(R) < LENGTHS.unsqueeze(1)
ENDED = torch.tensor([False, True, True, True, False, True, True, True])
NUMBERS = torch.randn(6, B, R, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
OLD, NEW = -NUMBERS[0].abs() - 0.1, -NUMBERS[0].abs() - 0.1 + 0.2 * NUMBERS[1]
REF, SAMPLER = OLD + 0.5 * NUMBERS[2], OLD + 0.3 * NUMBERS[3]
ENTROPY = NUMBERS[4].abs().float().double()  # TRL takes its threshold in float32
ADVANTAGES = torch.tensor([1.0, -0.5, 2.0, -1.5, 0.7, -0.2, -1.0, 0.4], dtype=torch.float64)


@pytest.fixture(autouse=True)
def float64_numbers():
    """TRL makes tensors of its settings: 1.05 in float32 is another number."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Accelerator:
    """One process."""

    num_processes = 1

    def reduce(self, x, reduction):
        return x

    def gather(self, x):
        return x

    def pad_across_processes(self, x, **_):
        return x


def _slopes(loss, logprobs, entropy):
    """A loss with its gradient at log π_θ and, if it has a bonus, at the entropies."""
    slopes = torch.autograd.grad(loss, [logprobs, entropy], allow_unused=True)
    return loss.detach(), *(slope for slope in slopes if slope is not None)


def theirs(*, mask=RESPONSE, sampler=None, beta=0.0, **options):
    """Loss of TRL and its gradient at log π_θ, (B, R)."""
    trl = pytest.importorskip("trl", reason="the parity is with the installed TRL")
    if not trl.__version__.startswith("1.16"):
        pytest.skip(f"the formulas are those of TRL 1.16, here is {trl.__version__}")
    trainer = trl.GRPOTrainer
    args = {"use_bias_correction_kl": False, "delta": None, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    args |= {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    args |= {name: options.pop(name) for name in [*options] if name in args}
    usual = {"loss_type": "dapo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2}
    usual |= {"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "beta": beta, "use_vllm": False}
    logprobs, entropy = NEW.clone().requires_grad_(), ENTROPY.clone().requires_grad_()
    bonus = options.pop("entropy_coef", 0.0)
    this = SimpleNamespace(
        **(usual | options),
        args=SimpleNamespace(**args),
        accelerator=Accelerator(),
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=bonus != 0.0,
        entropy_coef=bonus,
        use_adaptive_entropy=False,
        _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None),
        get_off_policy_mask=trainer.get_off_policy_mask,
        get_gamma_weights=trainer.get_gamma_weights,
    )
    this.get_high_entropy_mask = trainer.get_high_entropy_mask.__get__(this)
    ids = torch.zeros(B, R, dtype=torch.int64)
    mask = mask.double()
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask}
    inputs |= {"advantages": ADVANTAGES, "old_per_token_logps": OLD, "ref_per_token_logps": REF}
    inputs |= {"num_items_in_batch": mask.sum()} | ({} if sampler is None else {"sampling_per_token_logps": sampler})
    loss = trainer._compute_loss(this, None, inputs)
    return _slopes(loss, logprobs, entropy)


def ours(algorithm, *, sampler=OLD):
    """The same of an algorithm here."""

    def padded(x):
        return torch.where(RESPONSE, x, 0.0)

    rollout = Rollout(
        tokens=torch.zeros(B, R + 1, dtype=torch.int64),
        attention_mask=torch.cat([torch.ones(B, 1, dtype=torch.bool), RESPONSE], 1),
        response_mask=RESPONSE,
        ended=ENDED,
        prompt_index=torch.arange(B) // 2,
        logprobs=padded(OLD),
        sampler_logprobs=padded(sampler),
        ref_logprobs=padded(REF),
        entropy=padded(ENTROPY),
        values=torch.zeros(B, R, dtype=torch.float64),
    )
    algorithm = algorithm.for_run(learned_reward=False, max_new_tokens=R)
    experience = algorithm.credit(rollout, ADVANTAGES)
    experience = replace(experience, advantages=ADVANTAGES.unsqueeze(1).expand_as(experience.advantages))
    logprobs, entropy = NEW.clone().requires_grad_(), ENTROPY.clone().requires_grad_()
    sums = VocabularySums(entropy, torch.zeros_like(entropy)) if algorithm.needs_vocabulary else None
    losses = algorithm.action_loss(logprobs, None, experience, sums).loss
    count = algorithm.reduction.count(experience.action_mask)
    loss = algorithm.reduction.total(losses, experience.action_mask) / count
    return _slopes(loss, logprobs, entropy)


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, **TIGHT)


def differ(found, wrong):
    assert (found[1] - wrong[1]).abs().max() > 1e-3


def tokens(**options) -> Algorithm:
    return Algorithm(**({"level": TokenLevel(), "reduction": TokenMean(), "beta": 0.0} | options))


K3_IN_LOSS = {"beta": BETA, "kl_term": KLInLoss(estimator=K3())}


def test_stand_in_computes_the_clipped_surrogate():
    """What was equal before: that the stand-in is TRL's loss, and that another bound is another."""
    same(ours(tokens()), theirs())
    differ(ours(tokens(surrogate=Clip(epsilon=0.1))), theirs())
    same(ours(tokens(**K3_IN_LOSS)), theirs(beta=BETA))


def test_sapo():
    same(ours(SAPOMethod()), theirs(loss_type="sapo"))
    hot = ours(SAPOMethod(surrogate=SAPO(temperature_positive=0.5, temperature_negative=3.0)))
    same(hot, theirs(loss_type="sapo", sapo_temperature_pos=0.5, sapo_temperature_neg=3.0))
    differ(ours(SAPOMethod()), theirs(loss_type="sapo", sapo_temperature_pos=0.5, sapo_temperature_neg=3.0))


def test_vespo():
    """The gradient: TRL's value has a constant of log π_θ more, and it divides by tokens and not by responses."""
    method = VESPOMethod(reduction=SeqMeanTokenSum())
    _, found = ours(method)
    _, expected = theirs(loss_type="vespo")
    assert_close(found * B / LENGTHS.sum(), expected, **TIGHT)
    other = replace(method, surrogate=replace(method.surrogate, k_negative=1.0, lambda_positive=1.0))
    assert_close(
        ours(other)[1] * B / LENGTHS.sum(), theirs(loss_type="vespo", vespo_k_neg=1.0, vespo_lambda_pos=1.0)[1], **TIGHT
    )
    assert (ours(other)[1] - found).abs().max() > 1e-3
    # the method's own reduction is the same gradient at another size
    assert_close(ours(VESPOMethod())[1] * R, found, **TIGHT)


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_luspo(beta):
    options = {"importance_sampling_level": "sequence", "beta": beta, "epsilon_low": 2e-3, "epsilon_high": 2.5e-3}
    expected = theirs(loss_type="luspo", **options)
    method = LUSPO(beta=beta, kl_term=KLInLoss(estimator=K3()))
    same(ours(method), expected)
    differ(ours(replace(method, surrogate=Clip(epsilon=0.2))), expected)
    differ(ours(replace(method, level=TokenLevel())), expected)


def test_masked_truncated_responses():
    found = ours(tokens(masks=MaskTruncated(), **K3_IN_LOSS))
    same(found, theirs(mask=RESPONSE & ENDED.unsqueeze(1), beta=BETA))
    differ(found, theirs(beta=BETA))


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.83])
def test_top_entropy(share):
    found = ours(tokens(masks=TopEntropy(share=share), **K3_IN_LOSS))
    same(found, theirs(top_entropy_quantile=share, beta=BETA))
    differ(found, theirs(beta=BETA))
    both = ours(tokens(masks=[TopEntropy(share=share), MaskTruncated()]))
    same(both, theirs(top_entropy_quantile=share, mask=RESPONSE & ENDED.unsqueeze(1)))


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3])
def test_off_policy_mask(threshold):
    mask = OffPolicyMask(threshold=threshold)
    for method, loss in ((tokens(**K3_IN_LOSS), {"beta": BETA}), (SAPOMethod(), {"loss_type": "sapo"})):
        masked = ours(replace(method, masks=mask), sampler=SAMPLER)
        same(masked, theirs(off_policy_mask_threshold=threshold, sampler=SAMPLER, **loss))
    plain = theirs(loss_type="sapo")
    if threshold == 0.02:
        differ(masked, plain)


def test_unbiased_kl():
    """TRL's ratio is to π_old: the same where π_old sampled."""
    term = KLInLoss(estimator=K3(), unbiased=True)
    expected = theirs(beta=BETA, use_bias_correction_kl=True)
    same(ours(tokens(beta=BETA, kl_term=term)), expected)
    differ(ours(tokens(**K3_IN_LOSS)), expected)
    differ(ours(tokens(beta=BETA, kl_term=term), sampler=SAMPLER), expected)


def test_entropy_bonus():
    """TRL's is a mean over tokens whatever the reduction; here it goes through the reduction of the loss."""
    found = ours(tokens(entropy_bonus=EntropyBonus(coef=0.3), **K3_IN_LOSS))
    assert len(found) == 3
    same(found, theirs(entropy_coef=0.3, beta=BETA))
    assert (found[2] - ours(tokens(entropy_bonus=EntropyBonus(coef=0.1), **K3_IN_LOSS))[2]).abs().max() > 1e-3


@pytest.mark.parametrize("silent", [False, True])
def test_gdpo(silent):
    """TRL's `normalize_then_sum` of two rewards, by its own lines; the plain sum is another number."""
    trl = pytest.importorskip("trl")
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(12, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 9.0])
    if silent:
        scores[:4, 1] = torch.nan  # a group that is not the second reward's task
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64)
    source = inspect.getsource(trl.GRPOTrainer)
    lines = source[source.index('elif self.multi_objective_aggregation == "normalize_then_sum":') :]
    lines = lines[lines.index("\n") + 1 : lines.index("is_std_zero")]
    this = SimpleNamespace(reward_funcs=[0, 1], reward_weights=weights)
    room = {"self": this, "torch": torch, "rewards_per_func": scores, "num_generations": 4, "device": "cpu"}
    room |= {"unscorable_mask": torch.zeros(12, dtype=torch.bool), "nanstd": trl.trainer.utils.nanstd}
    exec(textwrap.dedent(lines), room)
    groups, mask = torch.arange(12) // 4, torch.ones(12, 1, dtype=torch.bool)
    found = PerReward().summed(scores.T.unsqueeze(2), weights, mask, groups=groups, all_sum=local).advantages
    assert_close(found.squeeze(1), room["advantages"], atol=1e-12, rtol=1e-12)
    total = (scores.nan_to_num() @ weights).unsqueeze(1)
    plain = GroupAdvantage()(total, torch.zeros_like(total), mask, groups=groups, all_sum=local).advantages
    assert (plain.squeeze(1) - room["advantages"]).abs().max() > 0.1
