"""Every objective against the enumerated bandit: gradients at π_old are ∇J, and training reaches β·log Z."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from gathered import gathered
from test_modules_bandit_exact import (
    BETA,
    LENGTH,
    PROMPTS,
    RESPONSES,
    VOCAB,
    TableReward,
    enumerated_logprobs,
    every_response,
    objective_value,
    score_table,
)

from lightning_rlhf.core import (
    CISPO,
    K2,
    K3,
    SAPO,
    VESPO,
    BanditAdvantage,
    Clip,
    ConstantSchedule,
    FixedKL,
    GeometricLevel,
    GeometricTokenLevel,
    GroupAdvantage,
    ImportanceSampling,
    KLInLoss,
    KLInReward,
    KLPen,
    LearnedValue,
    LeaveOneOut,
    LinearSchedule,
    MaskedIS,
    NoScale,
    Reduction,
    RewardToGo,
    RunningMean,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SequenceLevel,
    TokenLevel,
    TokenMean,
    TruncatedIS,
    Whitened,
)
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.models import ScalarModel
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.rewards import Scores
from lightning_rlhf.rollout import UpdateSchedule
from lightning_rlhf.types import Experience

ROWS = [{"prompt": i} for i in range(len(PROMPTS)) for _ in RESPONSES]
SURROGATES = {
    "clip": Clip(),
    "clip-higher": Clip(epsilon=0.2, epsilon_high=0.28),
    "dual-clip": Clip(dual=3.0),
    "unclipped": ImportanceSampling(),
    "cispo": CISPO(),
    "cispo-bounded": CISPO(largest=1.28, smallest=0.8),
    "klpen": KLPen(coef=1.0, target=None),
    "klpen-adaptive": KLPen(coef=2.0, target=0.01),
    "sapo": SAPO(),
    "truncated": TruncatedIS(surrogate=Clip()),
    "masked": MaskedIS(surrogate=CISPO()),
}
LEVELS = {"sequence": SequenceLevel(), "token": TokenLevel()}


def make_module(network, table, *, samples: int = 1, lr: float = 0.02, epochs: int = 2, minibatch: int = 64, **options):
    return PPOModule(
        **gathered(
            policy=network,
            reward=TableReward(table),
            generation=SamplingParams(max_new_tokens=LENGTH, samples_per_prompt=samples),
            updates=UpdateSchedule(epochs=epochs, minibatch=minibatch, max_grad_norm=None),
            shaping=(),
            optimizer=partial(torch.optim.Adam, lr=lr, eps=1e-8),
            **({"schedule": ConstantSchedule(), "beta": FixedKL(coef=BETA)} | options),
        )
    )


class Enumerated:
    """A policy that has left its reference, and all responses to both prompts; made once, nothing trains it.

    Attributes:
        probabilities: π_old(y|x) of each row / number of prompts.
        expected: ∇J by autograd through the plain network.
    """

    def __init__(self, make_lm, kind: str) -> None:
        self.network = make_lm(kind, vocab=VOCAB, seed=1, initializer_range=0.15).double().eval()
        self.reference = make_lm(kind, vocab=VOCAB, seed=2, initializer_range=0.15).double().eval()
        self.rollout = every_response(None, self.network, self.reference)
        self.logp = enumerated_logprobs(self.network)
        with torch.no_grad():
            self.logp_ref = enumerated_logprobs(self.reference)
        self.parameters = list(self.network.parameters())
        self.probabilities = self.logp.detach().exp().flatten() / len(PROMPTS)
        self.expected = self.gradient(objective_value(self.logp, self.logp_ref, score_table(), BETA))

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(value, self.parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in grads])


@dataclass(frozen=True, kw_only=True)
class Expectation(Reduction):
    """Another reduction's total, every row times a probability: all of them are sums over rows."""

    inner: Reduction
    probabilities: torch.Tensor

    def total(self, losses, mask):
        return self.inner.total(losses * self.probabilities.unsqueeze(1), mask)

    def count(self, mask):
        return self.inner.count(mask)


class Setting:
    """The enumerated bandit in the hands of a module."""

    def __init__(self, bandit: Enumerated, **options) -> None:
        self.bandit, self.expected, self.probabilities = bandit, bandit.expected, bandit.probabilities
        self.module = make_module(bandit.network, score_table(), **options)
        self.module.configure_model()

    def credited(self, **changes: torch.Tensor) -> Experience:
        rollout = replace(self.bandit.rollout, **changes)
        scores = TableReward(score_table())(rollout, ROWS)
        return self.module.credit(rollout, Scores(scores, {}))

    def accumulated(self, experience: Experience, probabilities: torch.Tensor | None = None) -> torch.Tensor:
        """−∇ Σ_y p(y|x)·loss(y), as the module has it."""
        probabilities = self.probabilities if probabilities is None else probabilities
        reduction = Expectation(inner=self.module.algorithm.reduction, probabilities=probabilities)
        loss, _ = self.module.objective.actions(replace(self.module.algorithm, reduction=reduction), experience)
        return -self.bandit.gradient(loss)


@pytest.fixture(scope="module")
def setting(make_lm):
    known: dict[str, Enumerated] = {}

    def make(kind: str, **options) -> Setting:
        if kind not in known:
            known[kind] = Enumerated(make_lm, kind)
        return Setting(known[kind], **options)

    return make


def apart(a, b) -> float:
    return float((a - b).abs().max())


# (a) At π_old every surrogate is ∇J


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_surrogate_at_the_old_policy_is_the_gradient_of_the_objective(setting, surrogate, level):
    exact = setting("gpt2", surrogate=SURROGATES[surrogate], level=LEVELS[level], reduction=SeqMeanTokenSum())
    assert apart(exact.accumulated(exact.credited()), exact.expected) < 1e-9
    assert float(exact.expected.abs().max()) > 1e-2


@pytest.mark.parametrize("surrogate", ["cispo", "truncated"])
def test_surrogate_on_llama_is_the_gradient_of_the_objective(setting, surrogate):
    exact = setting("llama", surrogate=SURROGATES[surrogate], level=TokenLevel(), reduction=SeqMeanTokenSum())
    # Llama's norm computes in float32 whatever its weights are
    assert apart(exact.accumulated(exact.credited()), exact.expected) < 1e-5


def test_vespo_at_the_old_policy_is_the_gradient_of_the_objective(setting):
    exact = setting("gpt2", surrogate=VESPO(), level=SequenceLevel())
    experience = exact.credited()
    assert apart(exact.accumulated(experience), exact.expected) < 1e-9
    # negative control: where the policy has moved, φ is not 1
    moved = replace(experience, rollout=replace(experience.rollout, logprobs=experience.rollout.logprobs - 0.2))
    assert apart(exact.accumulated(moved), exact.expected) > 1e-2


def test_reward_to_go_is_the_gradient_of_the_objective(setting):
    """REINFORCE++'s credit, before it is whitened."""
    exact = setting("gpt2", surrogate=CISPO(), level=TokenLevel(), reduction=SeqMeanTokenSum(), advantage=RewardToGo())
    assert apart(exact.accumulated(exact.credited()), exact.expected) < 1e-9


@pytest.mark.parametrize("reduction", [SeqMeanTokenMean(), TokenMean()], ids=["mean-of-means", "token-mean"])
def test_means_over_tokens_are_not_the_gradient_of_the_objective(setting, reduction):
    """Negative control: GRPO's 1/|y|. Over a whole batch `TokenMean` only changes the size, so that it still agrees."""
    exact = setting("gpt2", surrogate=Clip(), level=TokenLevel(), reduction=reduction)
    found = exact.accumulated(exact.credited())
    if isinstance(reduction, TokenMean):
        assert apart(found, exact.expected) < 1e-9
    else:
        best = float(found @ exact.expected / (found @ found))  # nor is any multiple of it
        assert apart(best * found, exact.expected) > 1e-2 * float(exact.expected.abs().max())


def test_geometric_level_is_not_the_gradient_of_the_objective(setting):
    """Negative control: GSPO's ratio divides each response's gradient by its length."""
    exact = setting("gpt2", surrogate=Clip(epsilon=3e-4, epsilon_high=4e-4), level=GeometricLevel())
    found = exact.accumulated(exact.credited())
    best = float(found @ exact.expected / (found @ found))
    assert apart(best * found, exact.expected) > 1e-2 * float(exact.expected.abs().max())


def test_length_times_the_geometric_ratio_is_the_gradient_of_the_objective(setting):
    """LUSPO gives back what GSPO divides by; its mean over tokens is GSPO."""
    options = {"surrogate": Clip(epsilon=3e-4, epsilon_high=4e-4)}
    luspo = setting("gpt2", level=GeometricTokenLevel(), reduction=SeqMeanTokenSum(), **options)
    assert apart(luspo.accumulated(luspo.credited()), luspo.expected) < 1e-9
    mean = setting("gpt2", level=GeometricTokenLevel(), reduction=SeqMeanTokenMean(), **options)
    gspo = setting("gpt2", level=GeometricLevel(), **options)
    of_gspo = gspo.credited()
    shared = replace(mean.credited(), advantages=of_gspo.advantages.expand(-1, LENGTH))
    assert apart(mean.accumulated(shared), gspo.accumulated(of_gspo)) < 1e-9
    assert apart(luspo.accumulated(shared), gspo.accumulated(of_gspo)) > 1e-3  # negative control


# (b) The KL in the loss


@pytest.mark.parametrize(
    ("level", "at"),
    [(SequenceLevel(), None), (TokenLevel(), SequenceLevel()), (SequenceLevel(), SequenceLevel())],
    ids=["bandit", "tokens-of-the-response", "named"],
)
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "klpen"])
def test_k2_of_responses_is_the_gradient_of_the_objective(setting, level, at, surrogate):
    term = KLInLoss(estimator=K2(), level=at)
    options = {"surrogate": SURROGATES[surrogate], "level": level, "reduction": SeqMeanTokenSum()}
    exact = setting("gpt2", kl_term=term, **options)
    assert apart(exact.accumulated(exact.credited()), exact.expected) < 1e-9


def test_k2_of_tokens_is_not_the_gradient_of_the_objective(setting):
    """It forgets what early tokens do to later states."""
    exact = setting("gpt2", kl_term=KLInLoss(), surrogate=Clip(), level=TokenLevel(), reduction=SeqMeanTokenSum())
    found = exact.accumulated(exact.credited())
    assert apart(found, exact.expected) > 1e-4
    reward = exact.bandit.gradient((exact.bandit.logp.exp() * score_table()).sum(1).mean())
    wrong, right = reward - found, reward - exact.expected
    assert float((wrong - right).norm() / right.norm()) < 0.7  # yet it points the same way
    assert float(wrong @ right) > 0


@pytest.mark.parametrize("at", [SequenceLevel(), TokenLevel()], ids=["response", "tokens"])
def test_k3_is_the_gradient_of_the_forward_kl(setting, at):
    """E[r] − β·KL(π_ref‖π): of responses, and of tokens the KL at the states that π_old reaches."""
    term = KLInLoss(estimator=K3(), level=at)
    exact = setting("gpt2", kl_term=term, surrogate=Clip(), level=TokenLevel(), reduction=SeqMeanTokenSum())
    found = exact.accumulated(exact.credited())
    assert apart(found, exact.expected) > 1e-3
    logp, logp_ref = exact.bandit.logp, exact.bandit.logp_ref
    reward = (logp.exp() * score_table()).sum(1).mean()
    if isinstance(at, SequenceLevel):
        forward = (logp_ref.exp() * (logp_ref - logp)).sum(1).mean()
    else:
        forward = sum(state_forward_kl(exact.bandit, prompt) for prompt in PROMPTS) / len(PROMPTS)
    assert apart(found, exact.bandit.gradient(reward - BETA * forward)) < 1e-9


def state_forward_kl(exact: Enumerated, prompt: list[int]) -> torch.Tensor:
    """Σ over states of π_old(state)·KL(π_ref(·|s)‖π(·|s)): the prompt, and the prompt with each token but the end."""

    def tables(tokens):
        rows = [network(input_ids=torch.tensor([tokens])).logits[0, -1] for network in (exact.network, exact.reference)]
        return [row.log_softmax(-1) for row in rows]

    def forward(policy, reference):
        reference = reference.detach()
        return (reference.exp() * (reference - policy)).sum()

    first, reference = tables(prompt)
    total = forward(first, reference)
    for token in range(1, VOCAB):
        total = total + first[token].detach().exp() * forward(*tables([*prompt, token]))
    return total


def test_a_baseline_cancels_wherever_the_kl_is(setting):
    """In expectation, so both are ∇J."""
    found = []
    for term in (KLInReward(), KLInLoss()):
        exact = setting("gpt2", kl_term=term, surrogate=ImportanceSampling())
        experience = exact.credited()
        found.append(exact.accumulated(replace(experience, advantages=experience.advantages - 5.0)))
        assert apart(found[-1], exact.expected) < 1e-9


# (e) Another policy sampled


@pytest.mark.parametrize("surrogate", ["clip", "cispo", "klpen"])
def test_weights_give_the_gradient_of_the_objective_under_another_sampler(setting, make_lm, surrogate):
    """Σ π_sampler·w·∇ = ∇J where no weight is capped; without w, or with a low cap, it is not."""
    sampler, found = make_lm("gpt2", vocab=VOCAB, seed=7, initializer_range=0.15).double().eval(), {}
    drawn = every_response(None, sampler, sampler).logprobs
    for name, wrapper in {
        "none": lambda inner: inner,
        "truncated": lambda inner: TruncatedIS(surrogate=inner, cap=1e9),
        "masked": lambda inner: MaskedIS(surrogate=inner, smallest=0.0, largest=1e9),
        "capped": lambda inner: TruncatedIS(surrogate=inner, cap=1.0),
        "rejecting": lambda inner: MaskedIS(surrogate=inner, smallest=0.9, largest=1.1),
    }.items():
        exact = setting("gpt2", surrogate=wrapper(SURROGATES[surrogate]))
        experience = exact.credited(sampler_logprobs=drawn)
        probabilities = drawn.sum(1).exp() / len(PROMPTS)
        assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-12)
        assert apart(probabilities, exact.probabilities) > 1e-3
        found[name] = apart(exact.accumulated(experience, probabilities), exact.expected)
    assert found["truncated"] < 1e-9
    assert found["masked"] < 1e-9
    assert min(found["none"], found["capped"], found["rejecting"]) > 1e-3


# (d) The first minibatch


ALL_LEVELS = LEVELS | {"geometric": GeometricLevel()}


PAIRS = [(s, n) for s in SURROGATES for n in ALL_LEVELS if not (s.startswith("klpen") and n == "geometric")]  # refused


@pytest.mark.parametrize(("surrogate", "level"), PAIRS)
@pytest.mark.filterwarnings("ignore:.*never acts on GeometricLevel")  # bounds of 0.2 inside the weights, on purpose
def test_first_minibatch_has_ratio_one(make_lm, left_padded, surrogate, level):
    """As the module measures it after a rollout of its own, k = 2; and not after the policy has moved."""
    chosen = SURROGATES[surrogate]
    if level == "geometric" and isinstance(chosen, Clip):
        chosen = Clip(epsilon=3e-4, epsilon_high=4e-4, dual=chosen.dual)
    network = make_lm("gpt2", vocab=VOCAB, seed=1, initializer_range=0.15)
    module = make_module(network, score_table(), surrogate=chosen, level=ALL_LEVELS[level], samples=2, minibatch=16)
    module.configure_model()
    module.double()
    prompts = left_padded(PROMPTS * 8, rows=[{"prompt": i % 2} for i in range(16)])
    rollout = module.collector.collect(prompts, samples=2, iteration=0)
    experience = module.credit(rollout, module.score(rollout, prompts))
    first, *_ = module.updates.minibatches(experience, None, seed=0)
    for moved in (False, True):
        _, metrics = module.objective.actions(module.algorithm, first[0])
        stats = metrics.means(lambda x: x)
        if not moved:
            assert stats["policy/ratio"] == pytest.approx(1.0, abs=1e-13)  # π_old is captured while sampling
            assert stats["policy/ratio_square"] == pytest.approx(1.0, abs=1e-13)
            assert stats["policy/approxkl_avg"] < 1e-26
            assert stats.get("policy/clipfrac_avg", 0.0) == 0.0
            assert stats.get("policy/kl_penalty", 0.0) < 1e-13
        else:
            assert stats["policy/ratio_square"] != 1.0
            assert stats["policy/approxkl_avg"] > 1e-6
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.05 * torch.ones_like(p).cumsum(0).cos())


# (c) Training


@pytest.fixture
def gap_closed(make_lm, make_scorer, make_trainer, left_padded, as_loader):
    """Trains; the share of the way from J(π_ref) to J* = β·log Z that was gone."""

    def run(kind="gpt2", *, responses=128, samples=1, rollouts=25, flip=1.0, **options) -> float:
        network = make_lm(kind, vocab=VOCAB, width=16, initializer_range=0.15)
        reference = copy.deepcopy(network).double().eval()
        scores = score_table()
        module = make_module(network, score_table(flip), samples=samples, schedule=LinearSchedule(), **options)
        if module.algorithm.advantage.needs_value:
            torch.manual_seed(3)
            module.configure_model = partial(with_value, module, module.configure_model, make_scorer)
        rows = responses // samples
        prompts = left_padded([PROMPTS[i % 2] for i in range(rows)], rows=[{"prompt": i % 2} for i in range(rows)])
        make_trainer(max_epochs=1).fit(module, as_loader([{"prompts": prompts}] * rollouts))
        assert module.episodes == responses * rollouts
        with torch.no_grad():
            logp_ref = enumerated_logprobs(reference)
            logp = enumerated_logprobs(module.policy.network.eval())
        best = BETA * (logp_ref + scores / BETA).logsumexp(1).mean()
        start = objective_value(logp_ref, logp_ref, scores, BETA)
        end = objective_value(logp, logp_ref, scores, BETA)
        assert end <= best + 1e-12
        return float((end - start) / (best - start))

    return run


def with_value(module, build, make_scorer) -> None:
    """A small value network, which a built policy does not bring along."""
    if module.policy is not None:
        return
    needs = module.algorithm
    module.algorithm = replace(needs, advantage=BanditAdvantage(), value_loss=None)
    build()
    module.algorithm = needs
    module.value = ScalarModel(make_scorer("gpt2", vocab=VOCAB, width=16, initializer_range=0.15))
    module.collector.value = module.value


ON_POLICY = {"epochs": 1, "minibatch": 128, "rollouts": 40}  # one step a rollout, for what nothing bounds
RLOO = {"samples": 4, "advantage": BanditAdvantage(baseline=LeaveOneOut())}
DR_GRPO = {
    "samples": 4,
    "advantage": GroupAdvantage(scale=NoScale()),
    "kl_term": KLInLoss(estimator=K2(), level=SequenceLevel()),
    "surrogate": Clip(),
    "epochs": 1,
    "rollouts": 60,
    "lr": 0.01,
}
METHODS = {
    "rloo": RLOO | ON_POLICY | {"surrogate": ImportanceSampling()},
    "cispo": RLOO | ON_POLICY | {"surrogate": CISPO(), "level": TokenLevel(), "reduction": SeqMeanTokenSum()},
    "dr-grpo": DR_GRPO,
    "dr-grpo-tokens": DR_GRPO | {"level": TokenLevel(), "reduction": SeqMeanTokenSum()},
    "reinforce-pp-baseline": {
        "samples": 4,
        "advantage": Whitened(estimator=GroupAdvantage(scale=NoScale())),
        "surrogate": Clip(),
        "level": TokenLevel(),
    },
    "running-mean": {"advantage": BanditAdvantage(baseline=RunningMean()), "surrogate": Clip(), "lr": 0.01},
    "learned-value": {"advantage": BanditAdvantage(baseline=LearnedValue()), "surrogate": Clip(), "lr": 0.01},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_training_reaches_beta_log_z(gap_closed, method):
    assert gap_closed(**METHODS[method]) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rloo", "dr-grpo"])
def test_training_on_flipped_scores_moves_away(gap_closed, method):
    assert gap_closed(**(METHODS[method] | {"flip": -1.0, "rollouts": 8})) < 0


@pytest.mark.slow
def test_many_steps_on_a_rollout_run_off_where_nothing_bounds_them(gap_closed):
    """E_old[ρÂ] = J + β·KL(π_θ‖π_old): the surrogate praises leaving. Eight steps a rollout, where CLIP arrives."""
    assert gap_closed(**RLOO, epochs=4, surrogate=SURROGATES["unclipped"]) < 0.5
    assert gap_closed(**RLOO, epochs=4, surrogate=SURROGATES["cispo"]) < 0.5
    assert gap_closed(**RLOO, epochs=4, surrogate=Clip()) > 0.8
