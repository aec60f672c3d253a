"""PPOModule: the first ratio, what must change nothing, PTX, logging, validation, resume."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gathered import gathered
from lightning.pytorch import Callback
from torch import nn

from lightning_rlhf.core import (
    GAE,
    AdaptiveKL,
    Algorithm,
    Clip,
    ConstantSchedule,
    FixedKL,
    KLPen,
    LinearSchedule,
    SeqMeanTokenSum,
    SequenceLevel,
    TokenLevel,
    Whitened,
)
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.rewards import Reward, Scores
from lightning_rlhf.rollout import RecomputedLogprobs, SamplerLogprobs, UpdateLogprobs, UpdateSchedule
from lightning_rlhf.types import Experience, Rollout

RAGGED = [[12, 13], [10], [14, 15, 16, 11], [17], [20, 21, 22], [23, 11], [10, 12], [33]]
TEXTS = [
    [12, 13, 14, 0],
    [10, 11, 0],
    [14, 15, 16, 11, 30, 0],
    [17, 0],
    [20, 21, 22, 0],
    [23, 11, 0],
    [9, 8],
    [1, 2, 3],
]
ENDS = list(range(10))  # any of these ends a response, so that lengths are ragged; prompts have none
SGD = partial(torch.optim.SGD, lr=0.05)


@pytest.fixture
def make_ppo(make_lm, token_reward):
    """A PPOModule on a random policy; plain SGD unless told otherwise."""

    def make(kind: str = "gpt2", *, policy: nn.Module | None = None, **options) -> PPOModule:
        usual = {
            "policy": make_lm(kind, end=ENDS).double() if policy is None else policy,
            "reward": token_reward(),
            "generation": SamplingParams(max_new_tokens=5),
            "shaping": (),
            "optimizer": SGD,
            "schedule": ConstantSchedule(),
        }
        return PPOModule(**gathered(**(usual | options)))

    return make


@pytest.fixture
def weights_after(make_ppo, make_trainer, as_loader):
    """Weights of the policy after training on the batches."""

    def run(batches, *, module=None, **options) -> torch.Tensor:
        module = module or make_ppo(**options)
        make_trainer().fit(module, as_loader(batches))
        return flat(module.policy)

    return run


def flat(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


# The first ratio


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("level", [SequenceLevel(), TokenLevel()], ids=["sequence", "token"])
@pytest.mark.parametrize(
    "old", [None, SamplerLogprobs(), UpdateLogprobs(), RecomputedLogprobs()], ids=lambda old: type(old).__name__
)
@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_first_ratio_is_one(make_ppo, make_trainer, as_loader, left_padded, recorder, kind, level, precision, old):
    """Exactly where log π_old comes from the update's kernels, else within their rounding from the cached passes'."""
    largest, exact = [], isinstance(old, UpdateLogprobs | RecomputedLogprobs)
    apart = 0.0 if exact else {"64-true": 1e-13, "32-true": 1e-4}[precision]

    class Watched(Clip):
        def __call__(self, log_ratio, advantages):
            largest.append(float(log_ratio.abs().max()))
            return super().__call__(log_ratio, advantages)

    generation = SamplingParams(max_new_tokens=5, temperature=0.7)
    module = make_ppo(kind, level=level, surrogate=Watched(), generation=generation, old_logprobs=old)
    batches = [{"prompts": left_padded(RAGGED)}] * 2
    make_trainer(callbacks=[recorder], precision=precision).fit(module, as_loader(batches))
    assert len(largest) == 2
    assert max(largest) <= apart
    for logged in recorder.steps:
        assert logged["policy/ratio"] == pytest.approx(1.0, abs=apart)
        assert logged["policy/ratio_var"] <= apart**2 + 1e-15  # of a difference of two numbers near 1
        assert logged["policy/approxkl_avg"] <= apart**2
        assert logged["policy/clipfrac_avg"] == 0.0


def test_later_ratios_are_not_one(make_ppo, make_trainer, as_loader, left_padded, recorder):
    module = make_ppo(updates=UpdateSchedule(epochs=2, minibatch=4))
    make_trainer(callbacks=[recorder]).fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    assert recorder.steps[0]["policy/approxkl_avg"] > 1e-8
    assert recorder.steps[0]["policy/ratio_var"] > 1e-8


def test_lora_dropout_leaves_the_first_ratio_at_one(
    make_folder, make_ppo, make_trainer, as_loader, left_padded, recorder
):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=64, lora_dropout=0.5, init_lora_weights=False, target_modules=["c_attn"])
    module = make_ppo(policy=ModelSource(path=make_folder(), peft=config))
    make_trainer(callbacks=[recorder]).fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    assert recorder.steps[0]["policy/approxkl_avg"] < 1e-24  # the sampler's adapter is folded in: float64's rounding


# What must change nothing


def test_extra_left_padding_changes_no_weight(weights_after, left_padded):
    wide = [{"prompts": left_padded(RAGGED, extra=3, fill=29)}] * 2
    narrow = [{"prompts": left_padded(RAGGED)}] * 2
    assert distance(weights_after(wide), weights_after(narrow)) < 1e-10
    other = [{"prompts": left_padded([row[::-1] for row in RAGGED])}] * 2
    assert distance(weights_after(other), weights_after(narrow)) > 1e-4


@pytest.fixture
def an_experience(make_ppo, left_padded, make_lm):
    """An off-policy experience with ragged responses, and the module that learns from it."""

    def make(kind: str = "gpt2", **options) -> tuple[PPOModule, Experience]:
        module = make_ppo(kind, **options)
        module.configure_model()
        module.double()
        rollout = module.collector.respond(left_padded(RAGGED), samples=1, stream="t", iteration=3)
        assert len(set(rollout.lengths.tolist())) > 2  # ragged, or these tests mean little
        scores = module.reward(rollout, [{}] * len(rollout))
        experience = module.credit(rollout, Scores(scores, {}))
        module.policy.network.load_state_dict(make_lm(kind, seed=0).double().state_dict())
        with torch.no_grad():
            for p in module.policy.parameters():
                p.add_(0.003 * torch.ones_like(p).cumsum(0).cos())
        return module, experience

    return make


def loss_and_gradient(module, experience):
    module.zero_grad()
    total = module.objective.actions(module.algorithm, experience)[0] / module.algorithm.reduction.count(
        experience.action_mask
    )
    total.backward()
    return float(total), torch.cat([p.grad.flatten() for p in module.policy.parameters()])


SETTINGS = [
    {"level": SequenceLevel(), "surrogate": Clip()},
    {"level": SequenceLevel(), "surrogate": KLPen(coef=0.7)},
    {"level": TokenLevel(), "surrogate": KLPen(coef=0.7), "reduction": SeqMeanTokenSum()},
    {"level": TokenLevel(), "surrogate": Clip()},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_permuting_the_rows_changes_no_gradient(an_experience, setting):
    module, experience = an_experience(**setting)
    loss, gradient = loss_and_gradient(module, experience)
    again, permuted = loss_and_gradient(module, experience.select(torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])))
    assert loss == pytest.approx(again, abs=1e-12)
    assert distance(gradient, permuted) < 1e-12
    _, doubled = loss_and_gradient(module, experience.select(torch.tensor([3, 1, 7, 0, 2, 6, 5, 5])))
    assert distance(gradient, doubled) > 1e-6


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_garbage_after_the_end_changes_no_gradient(an_experience, setting, kind):
    module, experience = an_experience(kind, **setting)
    loss, gradient = loss_and_gradient(module, experience)
    assert not experience.rollout.response_mask.all()
    changed = garbage_after_end(experience, columns=3, fill=31)
    again, padded = loss_and_gradient(module, changed)
    tolerance = 1e-11 if kind == "gpt2" else 1e-5  # Llama's norm computes in float32 whatever its weights are
    assert loss == pytest.approx(again, abs=tolerance)
    assert distance(gradient, padded) < tolerance


def garbage_after_end(experience: Experience, *, columns: int, fill: int) -> Experience:
    """More columns on the right, other tokens and NaN log-probs wherever the response is over."""
    old = experience.rollout
    more = (len(old), columns)
    response = torch.cat([old.response_mask, torch.zeros(more, dtype=torch.bool)], 1)
    tokens = torch.cat([old.tokens, torch.full(more, fill)], 1)
    tokens[:, old.prompt_width :][~response] = fill
    wide = {}
    for name in ("logprobs", "sampler_logprobs", "ref_logprobs", "entropy", "values"):
        wide[name] = torch.cat([getattr(old, name), torch.zeros(more)], 1).masked_fill(~response, float("nan"))
    rollout = Rollout(
        tokens=tokens,
        attention_mask=torch.cat([old.attention_mask, torch.zeros(more, dtype=torch.bool)], 1),
        response_mask=response,
        ended=old.ended,
        prompt_index=old.prompt_index,
        **wide,
    )
    if experience.action_mask.shape[1] == 1:
        return Experience(
            rollout=rollout,
            action_mask=experience.action_mask,
            rewards=experience.advantages,
            penalties=experience.advantages,
            advantages=experience.advantages,
            returns=experience.returns,
        )
    zeros = torch.zeros(more, dtype=torch.float64)
    return Experience(
        rollout=rollout,
        action_mask=response,
        rewards=torch.cat([experience.rewards, zeros], 1),
        penalties=torch.cat([experience.penalties, zeros], 1),
        advantages=torch.cat([experience.advantages, zeros], 1),
        returns=torch.cat([experience.returns, zeros], 1),
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("microbatch", [1, 3])
def test_microbatches_change_no_weight(weights_after, left_padded, right_padded, setting, microbatch):
    batches = [{"prompts": left_padded(RAGGED), "pretrain": right_padded(TEXTS)}] * 2
    setting = setting | {"ptx_coef": 0.5}
    whole = weights_after(batches, **setting, updates=UpdateSchedule(epochs=2, minibatch=4))
    pieces = weights_after(batches, **setting, updates=UpdateSchedule(epochs=2, minibatch=4, microbatch=microbatch))
    assert distance(whole, pieces) < 1e-10


def test_means_of_microbatches_are_not_the_mean(an_experience):
    """Negative control: what dividing each microbatch by its own count would give."""
    module, experience = an_experience(level=TokenLevel(), surrogate=Clip())
    _, gradient = loss_and_gradient(module, experience)
    halves = [experience.select(torch.arange(0, 4)), experience.select(torch.arange(4, 8))]
    assert len({int(half.action_mask.sum()) for half in halves}) == 2
    naive = sum(loss_and_gradient(module, half)[1] for half in halves) / 2
    assert distance(gradient, naive) > 1e-5


def test_gae_microbatches_change_no_weight(make_folder, make_ppo, make_trainer, as_loader, left_padded):
    folder = make_folder()

    def run(microbatch):
        torch.manual_seed(0)
        module = make_ppo(
            policy=ModelSource(path=folder),
            level=TokenLevel(),
            advantage=Whitened(estimator=GAE()),
            value_lr=0.2,
            updates=UpdateSchedule(minibatch=4, microbatch=microbatch),
        )
        make_trainer().fit(module, as_loader([{"prompts": left_padded(RAGGED)}] * 2))
        return flat(module.policy), flat(module.value)

    whole, pieces = run(None), run(3)
    assert distance(whole[0], pieces[0]) < 1e-10
    assert distance(whole[1], pieces[1]) < 1e-10


def test_gae_trains_both_networks_at_their_own_rates(make_folder, make_ppo, make_trainer, as_loader, left_padded):
    def run(value_lr):
        torch.manual_seed(0)
        module = make_ppo(policy=ModelSource(path=folder), level=TokenLevel(), advantage=GAE(), value_lr=value_lr)
        module.configure_model()
        module.double()
        before = flat(module.policy), flat(module.value)
        make_trainer().fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
        return flat(module.policy) - before[0], flat(module.value) - before[1]

    folder = make_folder()
    (policy, value), (same, doubled) = run(0.1), run(0.2)
    assert distance(policy, same) == 0.0
    assert distance(2 * value, doubled) < 1e-12
    assert float(value.abs().max()) > 1e-6


# Pretraining texts


def test_ptx_coef_zero_is_bit_identical_to_no_stream(weights_after, left_padded, right_padded):
    options = {"optimizer": partial(torch.optim.Adam, lr=0.01), "updates": UpdateSchedule(epochs=2, minibatch=4)}
    prompts = [{"prompts": left_padded(RAGGED)}] * 3
    both = [batch | {"pretrain": right_padded(TEXTS)} for batch in prompts]
    without, zero, some = (
        weights_after(prompts, **options),
        weights_after(both, ptx_coef=0.0, **options),
        weights_after(both, ptx_coef=0.1, **options),
    )
    assert torch.equal(without, zero)
    assert not torch.equal(without, some)


def test_ptx_gradient_is_linear_in_the_coefficient(weights_after, left_padded, right_padded):
    batch = [{"prompts": left_padded(RAGGED), "pretrain": right_padded(TEXTS)}]
    unclipped = {"updates": UpdateSchedule(max_grad_norm=None)}
    none, one, three = (weights_after(batch, ptx_coef=coef, **unclipped) for coef in (0.0, 1.0, 3.0))
    assert distance(three - none, 3 * (one - none)) < 1e-12
    assert distance(one, none) > 1e-4


def test_ptx_step_descends_the_mean_over_all_text_tokens(make_ppo, make_trainer, as_loader, left_padded, right_padded):
    """SGD step with γ less the step without = −lr·γ·∇(mean next-token loss), by a naive loop over texts."""
    coef, lr = 0.7, 0.05
    batch = {"prompts": left_padded(RAGGED), "pretrain": right_padded(TEXTS)}
    after = []
    for gamma in (coef, 0.0):
        module = make_ppo(ptx_coef=gamma, updates=UpdateSchedule(max_grad_norm=None))
        make_trainer().fit(module, as_loader([batch]))
        after.append(flat(module.policy))
    network = make_ppo().eval()._sources["policy"].double().eval()
    total, count = 0.0, 0
    for text in TEXTS:
        logits = network(input_ids=torch.tensor([text])).logits[0].log_softmax(-1)
        for i in range(1, len(text)):
            total, count = total - logits[i - 1, text[i]], count + 1
    (total / count).backward()
    expected = -lr * coef * torch.cat([p.grad.flatten() for p in network.parameters()])
    assert distance(after[0] - after[1], expected) < 1e-10


def test_ptx_without_a_stream_says_what_to_do(make_ppo, make_trainer, as_loader, left_padded):
    with pytest.raises(ValueError, match="ptx_coef.*pretrain"):
        make_trainer().fit(make_ppo(ptx_coef=1.0), as_loader([{"prompts": left_padded(RAGGED)}]))


def test_negative_ptx_coef_is_refused(make_ppo):
    with pytest.raises(ValueError, match="ptx_coef"):
        make_ppo(ptx_coef=-0.1)


# What is logged, and what adapts


@pytest.mark.parametrize("level", [0.0, 1e12])  # at 1e12 a float64 is a multiple of 1e-4
def test_logged_objective_is_counted_by_hand(make_ppo, make_trainer, as_loader, left_padded, recorder, level):
    seen = []

    class Spy(Reward):
        def __call__(self, rollout, rows):
            seen.append(rollout)
            return torch.arange(8.0, dtype=torch.float64) + level

    def drift(module):  # the policy leaves its reference
        with torch.no_grad():
            for p in module.policy.parameters():
                p.mul_(1.01)

    module = make_ppo(reward=Spy(), beta=FixedKL(coef=0.3))
    module.configure_model()
    module.double()
    drift(module)
    make_trainer(callbacks=[recorder]).fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    (rollout,), (logged,) = seen, recorder.steps
    kl = [
        sum(float(rollout.logprobs[i, t] - rollout.ref_logprobs[i, t]) for t in range(int(rollout.lengths[i])))
        for i in range(8)
    ]
    assert max(map(abs, kl)) > 1e-3
    assert logged["objective/kl"] == pytest.approx(sum(kl) / 8, abs=1e-7)  # logged as float32
    assert logged["objective/scores"] == pytest.approx(3.5 + level, rel=1e-7)
    assert logged["objective/rlhf_reward"] == pytest.approx(3.5 + level - 0.3 * sum(kl) / 8, abs=1e-6, rel=1e-7)
    assert logged["objective/non_score_reward"] == pytest.approx(-0.3 * sum(kl) / 8, abs=1e-7)
    assert logged["objective/response_length"] == float(rollout.lengths.double().mean())
    assert logged["objective/eos_rate"] == float(rollout.ended.double().mean())
    assert logged["objective/kl_coef"] == pytest.approx(0.3)
    assert logged["episode"] == 8.0
    assert logged["lr"] == pytest.approx(0.05)


def test_adaptive_kl_moves_by_its_formula(make_ppo, make_trainer, as_loader, left_padded, recorder):
    module = make_ppo(beta=AdaptiveKL(coef=0.1, target=1.0, horizon=100.0))
    make_trainer(callbacks=[recorder]).fit(module, as_loader([{"prompts": left_padded(RAGGED)}] * 2))
    # KL is far below the target of 1: e = −0.2, 8 episodes of a horizon of 100
    assert recorder.steps[0]["objective/kl_coef"] == pytest.approx(0.1)
    assert recorder.steps[1]["objective/kl_coef"] == pytest.approx(0.1 * (1 - 0.2 * 8 / 100))
    assert module.algorithm.kl.coef == pytest.approx(0.1 * (1 - 0.2 * 8 / 100) ** 2)


@pytest.mark.parametrize(("lr", "coef"), [(1e-6, 0.5), (0.5, 2.0)], ids=["halves", "doubles"])
def test_adaptive_surrogate_moves(make_ppo, make_trainer, as_loader, left_padded, lr, coef):
    module = make_ppo(
        surrogate=KLPen(coef=1.0, target=1e-4),
        optimizer=partial(torch.optim.SGD, lr=lr),
        updates=UpdateSchedule(max_grad_norm=None),
    )
    make_trainer().fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    assert module.algorithm.surrogate.coef == coef


def test_kl_old_is_measured_after_the_update(make_ppo, make_trainer, as_loader, left_padded, recorder):
    """One optimizer step: every ratio of the update is 1, yet the KL after it is not 0; k3 by hand."""
    kept = []

    class Spy(KLPen):
        def __call__(self, log_ratio, advantages):
            return super().__call__(log_ratio, advantages)

    module = make_ppo(surrogate=Spy(coef=1.0, target=0.5))
    original = module.credit
    module.credit = lambda *a, **k: kept.append(original(*a, **k)) or kept[-1]
    make_trainer(callbacks=[recorder]).fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    rollout = kept[0].rollout
    total = 0.0
    for i in range(8):
        ids = rollout.tokens[i][rollout.attention_mask[i]]
        length = int(rollout.lengths[i])
        logits = module.policy.network(input_ids=ids.unsqueeze(0)).logits[0].log_softmax(-1)
        new = sum(float(logits[len(ids) - length + t - 1, ids[len(ids) - length + t]]) for t in range(length))
        log_ratio = new - float(rollout.logprobs[i].sum())
        total += (torch.tensor(log_ratio).double().exp() - 1).item() - log_ratio
    assert recorder.steps[0]["policy/kl_old"] == pytest.approx(total / 8, rel=1e-5)
    assert total > 1e-6


def test_linear_schedule_reaches_its_steps(make_ppo, make_trainer, as_loader, left_padded, recorder):
    module = make_ppo(schedule=LinearSchedule(), updates=UpdateSchedule(epochs=2, minibatch=4))
    trainer = make_trainer(callbacks=[recorder], max_epochs=2)
    trainer.fit(module, as_loader([{"prompts": left_padded(RAGGED)}] * 2))
    assert [step["lr"] for step in recorder.steps] == pytest.approx([0.05, 0.0375, 0.025, 0.0125])
    assert trainer.global_step == 16  # 4 rollouts of 2 epochs of 2 minibatches


def test_linear_schedule_counts_rollouts_under_max_steps(make_ppo, make_trainer, as_loader, left_padded, recorder):
    module = make_ppo(schedule=LinearSchedule(), updates=UpdateSchedule(minibatch=4))
    trainer = make_trainer(callbacks=[recorder], max_epochs=-1, max_steps=8)
    trainer.fit(module, as_loader([{"prompts": left_padded(RAGGED)}] * 9))
    assert [step["lr"] for step in recorder.steps] == pytest.approx([0.05, 0.0375, 0.025, 0.0125])


def test_gradients_are_clipped(weights_after, make_ppo, left_padded, make_lm):
    batch = [{"prompts": left_padded(RAGGED)}]
    start = flat(make_lm().double())
    step = weights_after(batch, updates=UpdateSchedule(max_grad_norm=0.01)) - start
    assert float(step.norm()) == pytest.approx(0.05 * 0.01, rel=1e-3)  # torch adds 1e-6 to the norm
    free = weights_after(batch, updates=UpdateSchedule(max_grad_norm=None)) - start
    assert float(free.norm()) > 2 * float(step.norm())


def test_score_with_a_gradient_trains_the_same(make_ppo, weights_after, left_padded, token_reward):
    """A reward that forgot `no_grad` neither fails nor leaks its graph into the loss."""
    scale = torch.ones((), requires_grad=True)

    class Careless(Reward):
        def __call__(self, rollout, rows):
            return token_reward()(rollout, rows) * scale

    batch = [{"prompts": left_padded(RAGGED)}]
    updates = UpdateSchedule(epochs=2, minibatch=4)
    assert torch.equal(weights_after(batch, reward=Careless(), updates=updates), weights_after(batch, updates=updates))
    assert scale.grad is None


# Updates that do not fit


def test_minibatch_that_does_not_divide_is_refused(make_ppo, make_trainer, as_loader, left_padded):
    with pytest.raises(ValueError, match=r"minibatch=3 for 8 sequences; use [24]"):
        make_trainer().fit(make_ppo(updates=UpdateSchedule(minibatch=3)), as_loader([{"prompts": left_padded(RAGGED)}]))


def test_value_arguments_without_a_value_network_are_refused(make_ppo):
    with pytest.raises(ValueError, match="BanditAdvantage"):
        make_ppo(value_lr=0.1)


def test_gae_on_a_built_policy_needs_a_value_source(make_ppo):
    with pytest.raises(ValueError, match="`value`"):
        make_ppo(advantage=GAE()).configure_model()


# Validation, test, predict


def test_validation_measures_reward_and_kl(make_ppo, make_trainer, as_loader, left_padded, right_padded):
    module = make_ppo()
    loaders = [as_loader([left_padded(RAGGED)]), as_loader([right_padded(TEXTS)])]
    (found, *_) = make_trainer().validate(module, loaders, verbose=False)
    assert found["eval/kl"] == pytest.approx(0.0, abs=1e-12)  # other memory, other rounding
    assert {"eval/reward", "eval/kl", "eval/response_length", "eval/eos_rate", "eval/ptx_loss"} <= found.keys()
    network = module.policy.network.eval()
    losses = []
    for text in TEXTS:
        logits = network(input_ids=torch.tensor([text])).logits[0].log_softmax(-1)
        losses += [-float(logits[i - 1, text[i]]) for i in range(1, len(text))]
    assert found["eval/ptx_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    with torch.no_grad():
        for p in module.policy.parameters():
            p.mul_(1.1)
    (moved, *_) = make_trainer().validate(module, loaders, verbose=False)
    assert moved["eval/kl"] != 0.0


def test_validation_mean_is_over_the_rows(make_ppo, make_trainer, as_loader, left_padded):
    """Batches of unequal size; the scores are numbers of the rows."""

    class Numbered(Reward):
        def __call__(self, rollout, rows):
            return torch.tensor([row["score"] for row in rows])

    rows = [{"prompt": "p", "score": float(i)} for i in range(8)]
    batches = [left_padded(RAGGED[:5], rows=rows[:5]), left_padded(RAGGED[5:], rows=rows[5:])]
    for run, prefix in (("validate", "eval"), ("test", "test")):
        (found,) = getattr(make_trainer(), run)(make_ppo(reward=Numbered()), as_loader(batches), verbose=False)
        assert found[f"{prefix}/reward"] == pytest.approx(3.5)


def test_filler_rows_do_not_count(make_ppo, make_trainer, as_loader, left_padded, right_padded):
    class Numbered(Reward):
        def __call__(self, rollout, rows):
            return torch.tensor([row["score"] for row in rows])

    rows = [{"prompt": "p", "score": score} for score in (1.0, 3.0, 1000.0)]
    batch = left_padded(RAGGED[:3], rows=rows, counts=[True, True, False])
    texts = right_padded(TEXTS[:3])
    filled = texts._replace(target=texts.target & torch.tensor([[True], [True], [False]]))
    loaders = [as_loader([batch]), as_loader([filled])]
    (found, *_) = make_trainer().validate(make_ppo(reward=Numbered()), loaders, verbose=False)
    (alone, *_) = make_trainer().validate(
        make_ppo(reward=Numbered()),
        [as_loader([left_padded(RAGGED[:2], rows=rows[:2])]), as_loader([right_padded(TEXTS[:2])])],
        verbose=False,
    )
    assert found["eval/reward"] == 2.0
    for name in ("eval/response_length", "eval/eos_rate", "eval/ptx_loss", "eval/entropy"):
        assert found[name] == pytest.approx(alone[name], abs=1e-6)
    records = make_trainer().predict(make_ppo(reward=Numbered()), as_loader([batch]))
    assert [record["score"] for record in records[0]] == [1.0, 3.0]


def test_predict_gives_the_rows_with_what_was_measured(make_ppo, make_trainer, as_loader, left_padded, toy_tokenizer):
    module = make_ppo(tokenizer=toy_tokenizer)
    rows = [{"prompt": "a", "topic": f"t{i}"} for i in range(8)]
    (records,) = make_trainer().predict(module, as_loader([left_padded(RAGGED, rows=rows)]))
    assert [record["topic"] for record in records] == [f"t{i}" for i in range(8)]
    for record in records:
        assert record.keys() == {
            "prompt",
            "topic",
            "response",
            "raw_score",
            "score",
            "kl",
            "entropy",
            "length",
            "ended",
        }
        assert isinstance(record["response"], str)
        assert record["kl"] == pytest.approx(0.0, abs=1e-12)
        assert 1 <= record["length"] <= 5
        assert "</s>" not in record["response"]


def test_validation_leaves_training_alone(make_ppo, make_trainer, as_loader, left_padded):
    """Held-out rollouts draw random numbers of their own."""

    def run(validate: bool):
        module = make_ppo()
        batches = as_loader([{"prompts": left_padded(RAGGED)}] * 3)
        held_out = as_loader([left_padded(RAGGED[::-1])]) if validate else None
        make_trainer(val_check_interval=1).fit(module, batches, held_out)
        return flat(module.policy)

    assert torch.equal(run(True), run(False))


# Interrupted = uninterrupted


def test_resumed_training_equals_uninterrupted(make_ppo, make_trainer, as_loader, left_padded, right_padded, tmp_path):
    def make():
        return make_ppo(
            beta=AdaptiveKL(coef=0.1, target=0.5, horizon=50.0),
            surrogate=KLPen(coef=1.0, target=1e-3),
            updates=UpdateSchedule(epochs=2, minibatch=4),
            optimizer=partial(torch.optim.Adam, lr=0.01),
            schedule=LinearSchedule(warmup=1, floor=0.5),
            ptx_coef=0.3,
        )

    batches = [
        {"prompts": left_padded(RAGGED[i:] + RAGGED[:i]), "pretrain": right_padded(TEXTS[i:] + TEXTS[:i])}
        for i in range(2)
    ]
    whole = make()
    make_trainer(max_epochs=2).fit(whole, as_loader(batches))

    class Interruption(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    first = make()
    trainer = make_trainer(max_epochs=2, callbacks=[Interruption()])
    trainer.fit(first, as_loader(batches))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert checkpoint["rlhf"]["iteration"] == 2

    second = make()
    make_trainer(max_epochs=2).fit(second, as_loader(batches), ckpt_path=tmp_path / "half.ckpt")
    assert (second.iteration, second.episodes) == (whole.iteration, whole.episodes) == (4, 32)
    assert second.algorithm.kl.coef == whole.algorithm.kl.coef != first.algorithm.kl.coef
    assert second.algorithm.surrogate.coef == whole.algorithm.surrogate.coef != 1.0
    assert distance(flat(second.policy), flat(first.policy)) > 1e-4
    assert distance(flat(second.policy), flat(whole.policy)) < 1e-12  # other memory, other rounding


def test_checkpoint_holds_the_trained_networks_alone(make_ppo, make_trainer, as_loader, left_padded, tmp_path):
    module = make_ppo()
    trainer = make_trainer()
    trainer.fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    names = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"].keys()
    assert {name.split(".")[0] for name in names} == {"policy"}
    assert module.state_dict().keys() == names


def test_checkpoint_of_another_controller_is_refused(make_ppo, make_trainer, as_loader, left_padded, tmp_path):
    trainer = make_trainer()
    trainer.fit(make_ppo(beta=AdaptiveKL()), as_loader([{"prompts": left_padded(RAGGED)}]))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="AdaptiveKL"):
        make_trainer(max_epochs=2).fit(
            make_ppo(), as_loader([{"prompts": left_padded(RAGGED)}]), ckpt_path=tmp_path / "x.ckpt"
        )


# Mixed precision


@pytest.fixture
def mixed(make_ppo, make_lm, make_trainer, as_loader, left_padded, recorder):
    """Weights before and after one rollout of two epochs of two minibatches, in bfloat16 where it matters."""

    def run(precision: str = "bf16-mixed", **options):
        policy = make_lm("llama", end=ENDS)
        before = {name: p.detach().clone() for name, p in policy.named_parameters()}
        module = make_ppo(policy=policy, updates=UpdateSchedule(epochs=2, minibatch=4), **options)
        trainer = make_trainer(precision=precision, callbacks=[recorder])
        trainer.fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
        return before, dict(policy.named_parameters())

    return run


def test_mixed_precision_trains_every_weight(mixed):
    """Autocast keeps casts made under `no_grad`, through which no gradient flows."""
    before, after = mixed()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert not still


def linear_weights_only(network: nn.Module) -> nn.Module:
    """Only what autocast casts is trained."""
    for name, p in network.named_parameters():
        p.requires_grad_("proj" in name)
    return network


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_later_steps_see_the_weights_of_earlier_ones(
    make_ppo, make_lm, make_trainer, as_loader, left_padded, precision
):
    """Autocast keeps the casts of weights that the optimizer has changed since, until its context ends."""
    largest = []

    class Watched(KLPen):
        def __call__(self, log_ratio, advantages):
            largest.append(float(log_ratio.detach().abs().max()))
            return super().__call__(log_ratio, advantages)

    module = make_ppo(
        policy=linear_weights_only(make_lm("llama", end=ENDS)),
        surrogate=Watched(coef=1.0, target=1e-3),
        updates=UpdateSchedule(epochs=2, max_grad_norm=None),
        optimizer=partial(torch.optim.SGD, lr=1.0),
    )
    make_trainer(precision=precision).fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    first, second = largest
    assert first == 0.0
    assert second > 0.01


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_kl_old_sees_the_updated_weights(make_ppo, make_lm, make_trainer, as_loader, left_padded, recorder, precision):
    module = make_ppo(
        policy=linear_weights_only(make_lm("llama", end=ENDS)),
        surrogate=KLPen(coef=1.0, target=1e-3),
        updates=UpdateSchedule(max_grad_norm=None),
        optimizer=partial(torch.optim.SGD, lr=1.0),
    )
    trainer = make_trainer(precision=precision, callbacks=[recorder])
    trainer.fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    assert recorder.steps[0]["policy/kl_old"] > 1e-4


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_first_ratio_is_one_in_low_precision(
    make_ppo, make_lm, make_trainer, as_loader, left_padded, recorder, precision, kind
):
    module = make_ppo(policy=make_lm(kind, end=ENDS))
    make_trainer(precision=precision, callbacks=[recorder]).fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    assert recorder.steps[0]["policy/ratio"] == 1.0
    assert recorder.steps[0]["policy/approxkl_avg"] == 0.0
    assert recorder.steps[0]["objective/kl"] == 0.0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_training_goes_on_after_a_sanity_check(make_ppo, make_lm, make_trainer, as_loader, left_padded, precision):
    """Validation runs in inference mode: what it creates, training may not change."""
    module = make_ppo(policy=make_lm("llama", end=ENDS), updates=UpdateSchedule(epochs=2, minibatch=4))
    trainer = make_trainer(precision=precision, num_sanity_val_steps=2, val_check_interval=1)
    trainer.fit(module, as_loader([{"prompts": left_padded(RAGGED)}] * 2), as_loader([left_padded(RAGGED)]))
    assert module.iteration == 2


def test_checkpoint_loads_by_lightnings_own_method(
    make_ppo, make_lm, make_trainer, as_loader, left_padded, tmp_path, token_reward
):
    module = make_ppo(beta=AdaptiveKL(coef=0.1))
    trainer = make_trainer()
    trainer.fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = PPOModule.load_from_checkpoint(
        tmp_path / "x.ckpt",
        policy=make_lm(seed=5).double(),
        reward=token_reward(),
        algorithm=Algorithm(beta=AdaptiveKL(coef=0.1)),
    )
    assert torch.equal(flat(loaded.policy), flat(module.policy))
    assert (loaded.iteration, loaded.algorithm.kl) == (1, module.algorithm.kl)


def test_second_fit_goes_on(make_ppo, make_trainer, as_loader, left_padded):
    module = make_ppo()
    batches = as_loader([{"prompts": left_padded(RAGGED)}] * 2)
    make_trainer().fit(module, batches)
    reference = flat(module.collector.reference.frozen)
    make_trainer().fit(module, batches)
    assert (module.iteration, module.episodes) == (4, 32)
    assert torch.equal(flat(module.collector.reference.frozen), reference)


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_training_follows_an_evaluation(make_ppo, make_lm, make_trainer, as_loader, left_padded, precision, method):
    """How good is it before training? Outside `fit` that is inference mode, and its tensors can't be written later."""
    module = make_ppo(policy=make_lm("llama", end=ENDS))
    trainer = make_trainer(precision=precision)
    getattr(trainer, method)(module, as_loader([left_padded(RAGGED)]))
    trainer.fit(module, as_loader([{"prompts": left_padded(RAGGED)}] * 2))
    assert module.iteration == 2
