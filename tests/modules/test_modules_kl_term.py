"""Where the KL to the reference is charged: in the reward, or in the loss. Numbers by loops over rows and tokens."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from gathered import gathered
from test_modules_ppo import garbage_after_end

from lightning_rlhf.core import (
    K1,
    K2,
    K3,
    AdaptiveKL,
    BanditAdvantage,
    BatchMean,
    Clip,
    ConstantSchedule,
    FixedKL,
    GeometricLevel,
    KLInLoss,
    KLInReward,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    SequenceLevel,
    TokenLevel,
    TokenMean,
    TruncatedIS,
)
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.evaluation import evaluation
from lightning_rlhf.evaluation.mean_metrics import MeanMetrics, with_spread
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.rewards import Scores
from lightning_rlhf.rollout import UpdateSchedule

RAGGED = [[12, 13], [10], [14, 15, 16, 11], [17], [20, 21, 22], [23, 11], [10, 12], [33]]
ENDS = list(range(10))  # any of these ends a response, so that lengths are ragged; prompts have none
BETA = 0.3
LOW = SamplingParams(max_new_tokens=5, dtype="bfloat16")


@pytest.fixture
def make_ppo(make_lm, token_reward):
    """A PPOModule whose policy has left its reference."""

    def make(kind: str = "gpt2", *, drift: float = 0.02, **options) -> PPOModule:
        usual = {
            "policy": make_lm(kind, end=ENDS).double(),
            "reward": token_reward(),
            "generation": SamplingParams(max_new_tokens=5),
            "beta": FixedKL(coef=BETA),
            "shaping": (),
            "updates": UpdateSchedule(max_grad_norm=None),
            "optimizer": partial(torch.optim.SGD, lr=0.05),
            "schedule": ConstantSchedule(),
        }
        module = PPOModule(**gathered(**(usual | options)))
        module.configure_model()
        module.double()
        move(module, drift)
        return module

    return make


def move(module, scale: float) -> None:
    with torch.no_grad():
        for p in module.policy.parameters():
            p.add_(scale * torch.ones_like(p).cumsum(0).cos())


def numbers(metrics: MeanMetrics) -> dict[str, float]:
    return metrics.means(lambda x: x)


@pytest.fixture
def credited(left_padded):
    """An experience of today's policy, and what was logged of it."""

    def run(module):
        rollout = module.collector.respond(left_padded(RAGGED), samples=1, stream="t", iteration=3)
        assert len(set(rollout.lengths.tolist())) > 2  # ragged, or these tests mean little
        scores = Scores(module.reward(rollout, [{}] * 8), {})
        experience = module.credit(rollout, scores)
        return experience, numbers(evaluation.credited(rollout, scores, experience))

    return run


def learned(module, experience):
    """The gradient of the reduced loss, and what was logged of it."""
    module.zero_grad()
    loss, metrics = module.objective.actions(module.algorithm, experience)
    (loss / module.algorithm.reduction.count(experience.action_mask)).backward()
    return torch.cat([p.grad.flatten() for p in module.policy.parameters()]), numbers(metrics)


def flat(network) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def distance(a, b) -> float:
    return float((a - b).abs().max())


def log_ratios(rollout) -> list[list[float]]:
    """log π_old − log π_ref of every token, by row."""
    rows = zip(rollout.logprobs.tolist(), rollout.ref_logprobs.tolist(), rollout.lengths.tolist(), strict=True)
    return [[a - b for a, b in zip(old[:n], ref[:n], strict=True)] for old, ref, n in rows]


def half_square(x: float) -> float:
    return 0.5 * x * x


def grpo_s(x: float) -> float:
    return math.exp(-x) - 1 + x


def in_a_row(rows):
    return [x for row in rows for x in row]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# What is charged where


@pytest.mark.parametrize("level", [SequenceLevel(), TokenLevel()], ids=["sequence", "token"])
def test_kl_in_the_loss_leaves_the_reward_alone(make_ppo, credited, level):
    module = make_ppo(level=level, kl_term=KLInLoss())
    experience, logged = credited(module)
    kl = [sum(row) for row in log_ratios(experience.rollout)]
    assert abs(mean(kl)) > 1e-2
    assert logged["objective/kl"] == pytest.approx(mean(kl), abs=1e-12)
    assert logged["objective/non_score_reward"] == 0.0
    assert logged["objective/rlhf_reward"] == logged["objective/scores"]
    assert learned(module, experience)[1]["loss/kl_avg"] > 1e-6
    module = make_ppo(level=level, kl_term=KLInReward())
    experience, logged = credited(module)
    assert logged["objective/non_score_reward"] == pytest.approx(-BETA * mean(kl), abs=1e-12)
    assert learned(module, experience)[1]["loss/kl_avg"] == 0.0


@pytest.mark.parametrize(("estimator", "number"), [(K2(), half_square), (K3(), grpo_s)], ids=["k2", "k3"])
def test_logged_kl_is_counted_by_hand(make_ppo, credited, estimator, number):
    """Of responses, of tokens, and of responses shared out over their tokens."""
    cases = [
        (SequenceLevel(), None, lambda rows: mean(number(sum(row)) for row in rows)),
        (TokenLevel(), None, lambda rows: mean(number(x) for x in in_a_row(rows))),
        (SequenceLevel(), TokenLevel(), lambda rows: mean(sum(map(number, row)) for row in rows)),
        (TokenLevel(), SequenceLevel(), lambda rows: sum(number(sum(row)) for row in rows) / len(in_a_row(rows))),
    ]
    found = set()
    for level, at, by_hand in cases:
        module = make_ppo(level=level, kl_term=KLInLoss(estimator=estimator, level=at))
        experience, _ = credited(module)
        _, logged = learned(module, experience)
        assert logged["loss/kl_avg"] == pytest.approx(BETA * by_hand(log_ratios(experience.rollout)), abs=1e-12)
        found.add(round(logged["loss/kl_avg"], 9))
    assert len(found) == 4


def naive_kl(module, rollout, reduction) -> torch.Tensor:
    """The reduced estimate with its gradient, from one unpadded pass a row."""
    rows = []
    for i in range(len(rollout)):
        ids, n = rollout.tokens[i][rollout.attention_mask[i]], int(rollout.lengths[i])
        logits = module.policy.network(input_ids=ids.unsqueeze(0)).logits[0].log_softmax(-1)
        new = torch.stack([logits[len(ids) - n + t - 1, ids[len(ids) - n + t]] for t in range(n)])
        rows.append(new - rollout.ref_logprobs[i, :n])
    return reduction(rows)


def k2_of(x):
    return 0.5 * x * x


def k3_of(x):
    return (-x).exp() - 1 + x


CASES = {
    "response": ({"level": SequenceLevel()}, None, lambda k, rows: mean(k(row.sum()) for row in rows)),
    "token-mean": (
        {"level": TokenLevel(), "reduction": TokenMean()},
        None,
        lambda k, rows: sum(k(row).sum() for row in rows) / sum(map(len, rows)),
    ),
    "grpo": (
        {"level": TokenLevel(), "reduction": SeqMeanTokenMean()},
        None,
        lambda k, rows: mean(k(row).mean() for row in rows),
    ),
    "dr-grpo": (
        {"level": TokenLevel(), "reduction": SeqMeanTokenSumNorm(length=7)},
        None,
        lambda k, rows: mean(k(row).sum() for row in rows) / 7,
    ),
    "other-sampler": (  # whose weights are for the surrogate
        {"level": SequenceLevel(), "surrogate": TruncatedIS(cap=1.001), "generation": LOW},
        None,
        lambda k, rows: mean(k(row.sum()) for row in rows),
    ),
    "response-of-tokens": (
        {"level": TokenLevel(), "reduction": SeqMeanTokenSum()},
        SequenceLevel(),
        lambda k, rows: mean(k(row.sum()) for row in rows),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("estimator", "k"), [(K2(), k2_of), (K3(), k3_of)], ids=["k2", "k3"])
def test_gradient_is_that_of_beta_times_the_estimate(make_ppo, credited, estimator, k, case):
    """The gradient with β less the one without, away from π_old, against a naive loop over rows."""
    options, at, reduction = CASES[case]
    term = KLInLoss(estimator=estimator, level=at)
    module = make_ppo(kl_term=term, **options)
    experience, _ = credited(module)
    move(module, 0.003)
    charged, _ = learned(module, experience)
    module.algorithm = module.algorithm.with_beta(0.0)
    free, _ = learned(module, experience)
    module.zero_grad()
    naive_kl(module, experience.rollout, partial(reduction, k)).backward()
    expected = BETA * torch.cat([p.grad.flatten() for p in module.policy.parameters()])
    assert distance(charged - free, expected) < 1e-9
    assert float(expected.abs().max()) > 1e-3


def test_without_a_price_the_terms_are_one(make_ppo, credited):
    gradients = []
    for term in (KLInReward(), KLInLoss(), KLInLoss(estimator=K3(), level=TokenLevel())):
        module = make_ppo(beta=FixedKL(coef=0.0), kl_term=term)
        experience, _ = credited(module)
        move(module, 0.003)
        gradients.append(learned(module, experience)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_k2_in_the_loss_is_k1_in_the_reward_at_the_old_policy(make_ppo, credited):
    """Response by response, without baseline: ∇½ℓ² = ℓ·∇ℓ. Not so for k3, nor with a baseline, nor by tokens."""

    def gradient(term, **options):
        module = make_ppo(kl_term=term, **options)
        return learned(module, credited(module)[0])[0]

    bandit = gradient(KLInReward())
    assert distance(bandit, gradient(KLInLoss())) < 1e-10
    assert distance(bandit, gradient(KLInLoss(estimator=K3()))) > 1e-4
    centered = {"advantage": BanditAdvantage(baseline=BatchMean())}
    assert distance(gradient(KLInReward(), **centered), gradient(KLInLoss(), **centered)) > 1e-4
    tokens = {"level": TokenLevel(), "reduction": SeqMeanTokenSum()}
    assert distance(gradient(KLInReward(), **tokens), gradient(KLInLoss(), **tokens)) > 1e-4
    whole = gradient(KLInLoss(level=SequenceLevel()), **tokens)
    assert distance(gradient(KLInReward(), **tokens), whole) < 1e-10


def test_at_the_reference_the_kl_is_flat(make_ppo, credited):
    """β begins to act once the policy has left."""
    for estimator in (K2(), K3()):
        module = make_ppo(drift=0.0, kl_term=KLInLoss(estimator=estimator))
        experience, _ = credited(module)
        charged, logged = learned(module, experience)
        module.algorithm = module.algorithm.with_beta(0.0)
        assert logged["loss/kl_avg"] == pytest.approx(0.0, abs=1e-12)
        assert distance(charged, learned(module, experience)[0]) < 1e-12


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_kl_in_the_loss_pulls_towards_the_reference(make_ppo, make_trainer, as_loader, left_padded, recorder, sign):
    """With no score at all; and away with the sign turned."""

    class Signed(KLInLoss):
        def in_loss(self, *a, **o):
            return sign * super().in_loss(*a, **o)

    module = make_ppo(
        reward=torch.nn.Linear(1, 1),
        beta=FixedKL(coef=1.0),
        kl_term=Signed(),
        drift=0.05,
        optimizer=partial(torch.optim.SGD, lr=0.01),
    )
    module.score = lambda rollout, prompts: Scores(torch.zeros(len(rollout), dtype=torch.float64), {})
    batch = {"prompts": left_padded(RAGGED * 4)}
    make_trainer(callbacks=[recorder]).fit(module, as_loader([batch] * 5))
    first, *_, last = [step["objective/kl"] for step in recorder.steps]
    assert first > 0.02
    assert sign * (last - first) < -0.05 * first


def test_adaptive_price_follows_the_kl(make_ppo, make_trainer, as_loader, left_padded, recorder):
    """β of each rollout is what its loss is charged."""
    module = make_ppo(beta=AdaptiveKL(coef=0.1, target=1e-3, horizon=20.0), kl_term=KLInLoss())
    kept, original = [], module.credit
    module.credit = lambda *a, **o: kept.append(original(*a, **o)) or kept[-1]
    make_trainer(callbacks=[recorder]).fit(module, as_loader([{"prompts": left_padded(RAGGED)}] * 3))
    price = 0.1
    for experience, logged in zip(kept, recorder.steps, strict=True):
        assert logged["objective/kl_coef"] == pytest.approx(price, rel=1e-6)  # logged as float32
        estimate = mean(half_square(sum(row)) for row in log_ratios(experience.rollout))
        assert logged["loss/kl_avg"] == pytest.approx(price * estimate, rel=1e-5)
        error = min(max(logged["objective/kl"] / 1e-3 - 1, -0.2), 0.2)
        price *= 1 + error * 8 / 20
    assert module.algorithm.kl.coef == pytest.approx(price, rel=1e-6)
    assert price != 0.1


def test_k1_in_the_loss_is_refused():
    with pytest.raises(ValueError, match=r"K1 does nothing in the loss.*K2.*K3.*KLInReward"):
        KLInLoss(estimator=K1())
    assert KLInLoss(estimator=K2()) == KLInLoss()


# What must change nothing


INVARIANT = {
    "response": {"level": SequenceLevel(), "kl_term": KLInLoss()},
    "grpo": {"level": TokenLevel(), "kl_term": KLInLoss(estimator=K3()), "reduction": SeqMeanTokenMean()},
    "dr-grpo": {
        "level": TokenLevel(),
        "kl_term": KLInLoss(level=SequenceLevel()),
        "reduction": SeqMeanTokenSumNorm(length=5),
    },
    "mismatch": {"level": TokenLevel(), "kl_term": KLInLoss(), "surrogate": TruncatedIS(), "generation": LOW},
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("case", INVARIANT)
def test_garbage_after_the_end_changes_no_gradient(make_ppo, credited, case, kind):
    """Other tokens, more columns, and NaN in every log-probability past the end."""
    module = make_ppo(kind, **INVARIANT[case])
    experience, _ = credited(module)
    move(module, 0.003)
    gradient, logged = learned(module, experience)
    padded, again = learned(module, garbage_after_end(experience, columns=3, fill=31))
    tolerance = 1e-10 if kind == "gpt2" else 1e-4  # Llama's norm computes in float32 whatever its weights are
    assert logged == pytest.approx(again, abs=tolerance)
    assert distance(gradient, padded) < tolerance
    assert float(gradient.abs().max()) > 1e-2


@pytest.mark.parametrize("case", INVARIANT)
def test_permuting_the_rows_changes_no_gradient(make_ppo, credited, case):
    module = make_ppo(**INVARIANT[case])
    experience, _ = credited(module)
    move(module, 0.003)
    gradient, logged = learned(module, experience)
    permuted, again = learned(module, experience.select(torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])))
    assert logged == pytest.approx(again, abs=1e-11)
    assert distance(gradient, permuted) < 1e-11


@pytest.mark.parametrize("case", ["grpo", "mismatch"])
def test_microbatches_change_no_weight(make_ppo, make_trainer, as_loader, left_padded, case):
    def run(microbatch):
        module = make_ppo(updates=UpdateSchedule(epochs=2, minibatch=4, microbatch=microbatch), **INVARIANT[case])
        make_trainer().fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
        return flat(module.policy)

    assert distance(run(None), run(3)) < 1e-10


# Who sampled


@pytest.mark.parametrize(("kind", "tolerance"), [("gpt2", 1e-12), ("llama", 1e-5)])  # Llama's norm is in float32
def test_same_weights_have_no_mismatch(make_ppo, credited, kind, tolerance):
    gradients = []
    for surrogate in (Clip(), TruncatedIS(cap=3.0)):
        module = make_ppo(kind, surrogate=surrogate)
        experience, logged = credited(module)
        assert abs(logged["policy/kl_sampler"]) <= min(tolerance, 1e-10)
        assert distance(experience.rollout.sampler_logprobs, experience.rollout.logprobs) <= tolerance
        gradients.append(learned(module, experience)[0])
    assert distance(*gradients) <= 100 * tolerance  # of gradients of size 10


@pytest.mark.parametrize("level", [SequenceLevel(), TokenLevel()], ids=["sequence", "token"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_low_precision_sampler_is_seen_and_weighed(make_ppo, credited, kind, level):
    gradients = []
    for surrogate in (Clip(), TruncatedIS(cap=3.0)):
        module = make_ppo(kind, generation=LOW, level=level, surrogate=surrogate)
        experience, logged = credited(module)
        rollout = experience.rollout
        pairs = zip(rollout.sampler_logprobs.tolist(), rollout.logprobs.tolist(), rollout.lengths.tolist(), strict=True)
        gaps = [a - b for sampler, old, n in pairs for a, b in zip(sampler[:n], old[:n], strict=True)]
        assert max(map(abs, gaps)) > 1e-4
        assert logged["policy/kl_sampler"] == pytest.approx(mean(map(grpo_s, gaps)), abs=1e-12)
        assert logged["policy/kl_sampler"] > 1e-9
        gradient, stats = learned(module, experience)
        assert stats["policy/approxkl_avg"] < 1e-26  # the update's ratio is to the trainer's own numbers
        gradients.append(gradient)
    assert distance(*gradients) > 1e-4


@pytest.mark.parametrize("level", [TokenLevel(), SequenceLevel(), GeometricLevel()], ids=["token", "response", "gspo"])
def test_weights_are_those_of_each_action(make_ppo, credited, level):
    """In what is logged: −w·Â with w = min(π_old/π_sampler, C), the whole ratio under GSPO, too; the KL without w."""
    cap, by_token = 1.001, isinstance(level, TokenLevel)
    surrogate = TruncatedIS(surrogate=Clip(epsilon=3e-4, epsilon_high=4e-4), cap=cap)
    module = make_ppo(generation=LOW, level=level, kl_term=KLInLoss(), surrogate=surrogate)
    experience, _ = credited(module)
    _, logged = learned(module, experience)
    rollout, losses, plain, estimates, capped = experience.rollout, [], [], [], 0
    for i in range(len(rollout)):
        tokens = range(int(rollout.lengths[i]))
        for action in [[t] for t in tokens] if by_token else [list(tokens)]:
            w = math.exp(sum(float(rollout.logprobs[i, t] - rollout.sampler_logprobs[i, t]) for t in action))
            capped += w > cap
            plain.append(-float(experience.advantages[i, action[0]]))
            losses.append(min(w, cap) * plain[-1])
            log_ratio = sum(float(rollout.logprobs[i, t] - rollout.ref_logprobs[i, t]) for t in action)
            estimates.append(BETA * half_square(log_ratio))
    assert 0 < capped < len(losses)
    assert logged["loss/policy_avg"] == pytest.approx(mean(losses), abs=1e-9)
    assert logged["loss/kl_avg"] == pytest.approx(mean(estimates), abs=1e-12)
    assert mean(losses) != pytest.approx(mean(plain), abs=1e-5)


LEVELS = {
    "tokens": (TokenLevel(), None, None),
    "responses": (SequenceLevel(), None, None),
    "responses on tokens": (TokenLevel(), SequenceLevel(), 1.001),
    "truncated tokens": (TokenLevel(), None, 1.001),
}


@pytest.mark.parametrize("case", LEVELS)
def test_run_logs_how_far_sampler_and_trainer_are_apart(make_ppo, make_trainer, as_loader, left_padded, recorder, case):
    """Of all actions of the step, in two epochs of two minibatches; by loops over rows and tokens."""
    level, at, cap = LEVELS[case]
    surrogate = Clip() if cap is None else TruncatedIS(cap=cap, level=at)
    updates = UpdateSchedule(epochs=2, minibatch=4, microbatch=3)
    module = make_ppo(generation=LOW, level=level, surrogate=surrogate, updates=updates)
    make_trainer(callbacks=[recorder]).fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    rollout, ratios = module.outcome.rollout, []
    for old, sampler, n in zip(rollout.logprobs, rollout.sampler_logprobs, rollout.lengths.tolist(), strict=True):
        gaps = [float(old[t] - sampler[t]) for t in range(n)]
        if isinstance(level, SequenceLevel):
            ratios.append(math.exp(sum(gaps)))
        else:
            ratios += [math.exp(sum(gaps) if at else gap) for gap in gaps]
    logged, applied = recorder.steps[0], [w if cap is None else min(w, cap) for w in ratios]
    ess = mean(ratios) ** 2 / mean([w**2 for w in ratios])
    assert logged["policy/sampler_ess"] == pytest.approx(ess, abs=1e-12)
    assert 0 < ess < 1 - 1e-8
    changed = [w != v for w, v in zip(ratios, applied, strict=True)]
    assert logged["policy/sampler_truncated"] == pytest.approx(mean(changed), abs=1e-12)
    assert logged["policy/sampler_weight"] == pytest.approx(1.0 if cap is None else mean(applied), abs=1e-12)
    assert (0 < mean(changed) < 1) == (cap is not None)
    assert not {"policy/sampler_ratio", "policy/sampler_ratio_square"} & logged.keys()


def test_spread_equals_hand_values():
    """Of ρ 1 and 3: variance 1; of w 1, 1 and 4: 6²/(3·18) = 2/3; equal ones at any size, and none at all."""
    rho = {"policy/ratio": 2.0, "policy/ratio_square": 5.0}
    for w, ess in (([1.0, 1.0, 4.0], 2 / 3), ([1.0, 0.0], 1 / 2), ([1e17] * 3, 1.0), ([0.0] * 3, 0.0)):
        moments = {"policy/sampler_ratio": mean(w), "policy/sampler_ratio_square": mean([x**2 for x in w])}
        moments |= {"objective/raw_scores": 1.0, "objective/raw_scores_square": 5.0}
        stats = with_spread(rho | moments | {"lr": 0.5})
        assert stats.pop("objective/raw_scores") == 1.0
        assert stats.pop("objective/raw_scores_std") == 2.0
        assert stats == {
            "policy/ratio": 2.0,
            "policy/ratio_var": 1.0,
            "policy/sampler_ess": pytest.approx(ess, abs=1e-15),
            "lr": 0.5,
        }
        assert 0 <= stats["policy/sampler_ess"] <= 1


def test_same_policy_has_the_whole_sample(make_ppo, make_trainer, as_loader, left_padded, recorder):
    """Negative control: without a mismatch every action counts."""
    make_trainer(callbacks=[recorder]).fit(make_ppo(), as_loader([{"prompts": left_padded(RAGGED)}]))
    logged = recorder.steps[0]
    assert logged["policy/sampler_ess"] == pytest.approx(1.0, abs=1e-12)
    assert (logged["policy/sampler_weight"], logged["policy/sampler_truncated"]) == (1.0, 0.0)
