"""Losses over the whole vocabulary through PPOModule: entropy bonus, exact KL, on-policy distillation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_modules_bandit_exact import PROMPTS, VOCAB
from test_modules_objectives_exact import Enumerated, Setting

from lightning_rlhf import ModelSource, PPOModule, SamplingParams, UpdateSchedule
from lightning_rlhf.core import (
    AdaptiveEntropy,
    Algorithm,
    ConstantSchedule,
    EntropyBonus,
    ExactKL,
    KLInLoss,
    KLInReward,
    OnPolicyDistillation,
    SeqMeanTokenSum,
    SequenceLevel,
    TokenLevel,
)
from lightning_rlhf.models import PolicyModel
from lightning_rlhf.models.reference import Reference
from lightning_rlhf.rewards import ZeroReward
from lightning_rlhf.rollout import UpdateLogprobs

LEVELS = [SequenceLevel(), TokenLevel()]


@pytest.fixture(scope="module")
def bandit(make_lm):
    return Enumerated(make_lm, "gpt2")


def states(bandit) -> list[tuple[list[int], float]]:
    """Every prefix in which a token is chosen, with its probability under π_old, mean over the prompts."""
    found = []
    for prompt in PROMPTS:
        first = distribution(bandit.network, prompt).detach()
        found.append((prompt, 1 / len(PROMPTS)))
        found += [([*prompt, token], float(first[token]) / len(PROMPTS)) for token in range(1, VOCAB)]
    return found


def distribution(network, prefix: list[int]) -> torch.Tensor:
    return network(input_ids=torch.tensor([prefix])).logits[0, -1].softmax(0)


def entropy_of(bandit, prefix):
    p = distribution(bandit.network, prefix)
    return -(p * p.log()).sum()


def kl_of(bandit, prefix):
    p, q = distribution(bandit.network, prefix), distribution(bandit.reference, prefix).detach()
    return (p * (p / q).log()).sum()


def exact(bandit, term) -> torch.Tensor:
    """Σ over states of P(state)·term."""
    return sum(probability * term(bandit, prefix) for prefix, probability in states(bandit))


def in_hands(bandit, **options) -> Setting:
    """With the bandit's own reference."""
    setting = Setting(bandit, reduction=SeqMeanTokenSum(), **options)
    frozen = PolicyModel(bandit.reference).eval()
    setting.module.responder.collector.reference = Reference(setting.module.policy, frozen)
    return setting


def learned_from(setting: Setting) -> torch.Tensor:
    """∇ of the terms beside the surrogate, whose advantages are made 0."""
    experience = setting.credited()
    return setting.accumulated(replace(experience, advantages=torch.zeros_like(experience.advantages)))


# Gradients against enumeration


@pytest.mark.parametrize("level", LEVELS)
def test_bonus_is_the_entropy_at_the_states_that_were_reached(bandit, level):
    setting = in_hands(bandit, level=level, beta=0.0, entropy_bonus=EntropyBonus(coef=0.3))
    value = exact(bandit, entropy_of)
    assert float(value) == pytest.approx(float(-(bandit.logp.exp() * bandit.logp).sum(1).mean()), abs=1e-12)  # H(y|x)
    found = learned_from(setting)
    assert float((found - 0.3 * bandit.gradient(value)).abs().max()) < 1e-9
    assert float((found + 0.3 * bandit.gradient(value)).abs().max()) > 1e-3  # of the other sign


@pytest.mark.parametrize("level", LEVELS)
def test_exact_kl_is_the_kl_at_the_states_that_were_reached(bandit, level):
    setting = in_hands(bandit, level=level, beta=0.6, kl_term=ExactKL())
    value = exact(bandit, kl_of)
    whole = (bandit.logp.exp() * (bandit.logp - bandit.logp_ref)).sum(1).mean()
    assert float(value) == pytest.approx(float(whole), abs=1e-12)  # by the chain rule
    found = learned_from(setting)
    assert float((found + 0.6 * bandit.gradient(value)).abs().max()) < 1e-9
    assert float((found + 0.6 * bandit.gradient(whole)).abs().max()) > 1e-3  # which moves the states as well


def test_value_of_the_loss_is_that_of_the_kl(bandit):
    setting = in_hands(bandit, level=TokenLevel(), beta=0.6, kl_term=ExactKL())
    experience = setting.credited()
    assert not experience.penalties.any()
    _, metrics = setting.module.objective.actions(setting.module.algorithm, experience)
    assert float(metrics.means(lambda x: x)["loss/kl_avg"]) > 0


def test_log_probs_beside_the_sums_are_those_of_the_plain_pass(bandit):
    setting = in_hands(bandit, level=TokenLevel(), entropy_bonus=EntropyBonus())
    experience = setting.credited()
    logprobs, _ = setting.module.objective._measured(setting.module.algorithm, experience)
    assert torch.equal(logprobs, setting.module.objective.logprobs(experience))


# Runs


@pytest.fixture
def make_run(make_lm, make_trainer, as_loader, left_padded, recorder):
    """A module after some rollouts, with what it logged."""

    def make(algorithm, *, rollouts=3, copies=2, lr=0.01, policy=None, **options):
        module = PPOModule(
            policy=policy or make_lm(end=[0, 1]).double(),
            reward=options.pop("reward", ZeroReward()),
            algorithm=algorithm,
            generation=SamplingParams(max_new_tokens=5),
            optimizer=partial(torch.optim.Adam, lr=lr),
            schedule=ConstantSchedule(),
            **options,
        )
        prompts = left_padded([[12, 13], [10], [14, 15, 16, 11], [17]] * copies)
        make_trainer(callbacks=[recorder]).fit(module, as_loader([{"prompts": prompts}] * rollouts))
        return module

    return make


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()])


@pytest.mark.parametrize("updates", [{"microbatch": 3}, {"microbatch_tokens": 20}, {"minibatch": 4, "microbatch": 1}])
def test_microbatches_change_nothing(make_run, make_lm, updates):
    algorithm = Algorithm(entropy_bonus=EntropyBonus(coef=0.1), kl_term=ExactKL(), beta=0.3, level=TokenLevel())
    whole = {name: value for name, value in updates.items() if name == "minibatch"}
    found = [make_run(algorithm, updates=UpdateSchedule(**options)) for options in (whole, updates)]
    assert torch.allclose(*map(weights, found), atol=1e-10)


@pytest.mark.parametrize("term", [ExactKL(), KLInReward()])
def test_student_becomes_its_teacher(make_lm, make_run, tmp_path, make_tokenizer, recorder, term):
    """A teacher in the student's family, reward 0: the KL falls towards 0; without a price it does not."""
    teacher = make_lm(end=[0, 1], seed=3, initializer_range=0.3)
    teacher.save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    options = {
        "rollouts": 70,
        "copies": 16,
        "lr": 0.02,
        "reference": ModelSource(path=str(tmp_path / "teacher"), dtype="float64"),
    }
    policy = make_lm(end=[0, 1], seed=4, initializer_range=0.3).double()
    make_run(OnPolicyDistillation(kl_term=term), policy=policy, tokenizer=make_tokenizer(), **options)
    walked = [step["objective/kl"] for step in recorder.steps]
    assert walked[0] > 0.3
    assert sum(walked[-5:]) / 5 < (0.15 if isinstance(term, ExactKL) else 0.4) * walked[0]


def test_without_a_price_the_student_stays(make_lm, make_run, tmp_path, make_tokenizer):
    teacher = make_lm(end=[0, 1], seed=3, initializer_range=0.3)
    teacher.save_pretrained(tmp_path / "teacher")
    start = make_lm(end=[0, 1]).double()
    before = torch.cat([p.detach().flatten().clone() for p in start.parameters()])
    module = make_run(
        OnPolicyDistillation(beta=0.0), policy=start, reference=ModelSource(path=str(tmp_path / "teacher"))
    )
    assert torch.equal(weights(module), before)


def test_teacher_with_other_tokens_is_refused(make_lm, make_run, tmp_path, make_tokenizer):
    make_lm().save_pretrained(tmp_path / "teacher")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="reference"):
        make_run(OnPolicyDistillation(), tokenizer=make_tokenizer(), reference=str(tmp_path / "teacher"))


def test_adaptive_price_follows_the_logged_entropy(make_run, recorder):
    start = AdaptiveEntropy(coef=0.1, target=100.0, step=0.05)  # every entropy is below it
    module = make_run(Algorithm(entropy_bonus=start))
    assert module.algorithm.entropy_bonus.coef == pytest.approx(0.25)
    assert module.algorithm.entropy_bonus.entropy == pytest.approx(recorder.steps[-1]["policy/entropy_avg"])
    assert [step["objective/entropy_coef"] for step in recorder.steps] == pytest.approx([0.0, 0.15, 0.2])


def test_bonus_raises_the_entropy(make_run, make_lm, recorder):
    walked = {}
    for coef in (0.05, None):
        recorder.steps = []
        bonus = None if coef is None else EntropyBonus(coef=coef)
        policy = make_lm(end=[0, 1], initializer_range=0.3).double()
        make_run(Algorithm(entropy_bonus=bonus, beta=0.0, level=TokenLevel()), policy=policy, rollouts=10)
        walked[coef] = [step["policy/entropy_avg"] for step in recorder.steps]
    assert walked[0.05][-1] > walked[0.05][0] + 0.05
    assert walked[None][-1] == pytest.approx(walked[None][0], abs=0.2)
    assert walked[None][-1] < walked[0.05][-1]


def test_graph_of_log_probs_is_not_kept(make_run):
    with pytest.raises(ValueError, match="sums over the vocabulary"):
        make_run(Algorithm(entropy_bonus=EntropyBonus()), updates=UpdateSchedule(old_logprobs=UpdateLogprobs()))


@pytest.mark.parametrize(
    "algorithm", [OnPolicyDistillation(), Algorithm(kl_term=KLInLoss()), Algorithm(entropy_bonus=EntropyBonus())]
)
def test_advantages_of_zero_are_no_reason_to_warn_where_another_term_teaches(make_run, caplog, algorithm):
    make_run(algorithm, rollouts=2)
    assert "the advantages of all" not in caplog.text
    make_run(Algorithm(beta=0.0), rollouts=1)
    assert "the advantages of all" in caplog.text


def test_student_without_a_teacher_is_told(make_run):
    with pytest.warns(UserWarning, match="name a teacher"):
        make_run(OnPolicyDistillation(), rollouts=1)
