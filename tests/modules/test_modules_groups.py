"""PPOModule with several responses to each prompt: rows, counts, advantages by hand, data, resume."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from gathered import gathered
from lightning.pytorch import Callback

from lightning_rlhf.core import (
    AdaptiveKL,
    BanditAdvantage,
    BatchStd,
    Clip,
    ConstantSchedule,
    FixedKL,
    GroupAdvantage,
    GroupStd,
    KLInLoss,
    KLPen,
    LeaveOneOut,
    LinearSchedule,
    NoScale,
    RewardToGo,
    RunningMean,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    TokenLevel,
    TruncatedIS,
    Whitened,
)
from lightning_rlhf.data import PromptDataModule
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.rewards import Reward
from lightning_rlhf.rollout import UpdateSchedule

RAGGED = [[12, 13], [10], [14, 15, 16, 11], [17], [20, 21, 22], [23, 11], [10, 12], [33]]
ENDS = list(range(10))  # any of these ends a response, so that lengths are ragged; prompts have none
K = 3
SGD = partial(torch.optim.SGD, lr=0.05)


@pytest.fixture
def make_ppo(make_lm, token_reward):
    def make(kind: str = "gpt2", *, k: int = K, **options) -> PPOModule:
        usual = {
            "policy": make_lm(kind, end=ENDS).double(),
            "reward": token_reward(),
            "generation": SamplingParams(max_new_tokens=5, samples_per_prompt=k),
            "shaping": (),
            "optimizer": SGD,
            "schedule": ConstantSchedule(),
        }
        return PPOModule(**gathered(**(usual | options)))

    return make


class Spy(Reward):
    """Keeps the rollouts and rows that it scores; the score is drawn from the row's own number."""

    def __init__(self) -> None:
        self.seen = []

    def __call__(self, rollout, rows):
        self.seen.append((rollout, list(rows)))
        return torch.arange(len(rows), dtype=torch.float64).sin()


def flat(network) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def distance(a, b) -> float:
    return float((a - b).abs().max())


def drift(module, scale: float = 0.02) -> None:
    """The policy leaves its reference."""
    module.configure_model()
    module.double()
    with torch.no_grad():
        for p in module.policy.parameters():
            p.add_(scale * torch.ones_like(p).cumsum(0).cos())


# Rows and counts


def test_reward_sees_each_row_k_times_in_order(make_ppo, make_trainer, as_loader, left_padded, recorder):
    module = make_ppo(reward=Spy())
    rows = [{"prompt": f"p{i}", "answer": i} for i in range(8)]
    batch = left_padded(RAGGED, rows=rows)
    make_trainer(callbacks=[recorder]).fit(module, as_loader([{"prompts": batch}] * 2))
    for rollout, seen in module.reward.seen:
        assert [row["answer"] for row in seen] == [i for i in range(8) for _ in range(K)]
        for i, row in enumerate(seen):
            kept = rollout.attention_mask[i, : rollout.prompt_width]
            assert rollout.tokens[i, : rollout.prompt_width][kept].tolist() == RAGGED[row["answer"]]
    assert [step["episode"] for step in recorder.steps] == [24.0, 48.0]
    assert module.episodes == 48


def test_function_reward_gets_columns_of_k_rows(
    make_ppo, make_trainer, as_loader, left_padded, make_tokenizer, recorder
):
    seen = []

    def grade(prompts, responses, answer):
        seen.append((prompts, len(responses), answer))
        return [float(a) for a in answer]

    rows = [{"prompt": f"p{i}", "answer": i} for i in range(8)]
    module = make_ppo(reward=grade, tokenizer=make_tokenizer())
    batch = {"prompts": left_padded(RAGGED, rows=rows)}
    make_trainer(callbacks=[recorder]).fit(module, as_loader([batch]))
    ((prompts, count, answers),) = seen
    assert prompts == [f"p{i}" for i in range(8) for _ in range(K)]
    assert count == 24
    assert answers == [i for i in range(8) for _ in range(K)]
    assert recorder.steps[0]["objective/scores"] == 3.5
    assert recorder.steps[0]["objective/flat_groups"] == 1.0  # every response to a prompt earns the same


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_draws_one(make_ppo, make_trainer, as_loader, left_padded, stage):
    """And the same one, whatever the samples of training."""
    texts = []
    for k in (1, K):
        module = make_ppo(k=k, reward=Spy())
        found = getattr(make_trainer(), stage)(module, as_loader([left_padded(RAGGED)]))
        ((rollout, rows),) = module.reward.seen
        assert rollout.prompt_index.tolist() == list(range(8))
        assert [row["prompt"] for row in rows] == [f"p{i}" for i in range(8)]
        if stage == "predict":
            assert [record["prompt"] for record in found[0]] == [f"p{i}" for i in range(8)]
        texts.append(rollout.tokens)
    assert torch.equal(*texts)


def test_evaluation_beside_training_draws_one(make_ppo, make_trainer, as_loader, left_padded):
    module = make_ppo(reward=Spy())
    make_trainer(val_check_interval=1).fit(
        module, as_loader([{"prompts": left_padded(RAGGED)}]), as_loader([left_padded(RAGGED[:5])])
    )
    assert [len(rollout) for rollout, _ in module.reward.seen] == [24, 5]


@pytest.mark.parametrize(("minibatch", "steps"), [(24, 1), (12, 2), (3, 8), (1, 24)])
def test_minibatch_counts_responses(make_ppo, make_trainer, as_loader, left_padded, minibatch, steps):
    trainer = make_trainer()
    trainer.fit(make_ppo(updates=UpdateSchedule(minibatch=minibatch)), as_loader([{"prompts": left_padded(RAGGED)}]))
    assert trainer.global_step == steps


def test_minibatch_must_divide_the_responses(make_ppo, make_trainer, as_loader, left_padded):
    batch = [{"prompts": left_padded(RAGGED)}]
    with pytest.raises(ValueError, match="minibatch=16 for 24 sequences; use 12"):
        make_trainer().fit(make_ppo(updates=UpdateSchedule(minibatch=16)), as_loader(batch))
    with pytest.raises(ValueError, match="minibatch=3 for 8 sequences"):  # 3 divides 24, not 8
        make_trainer().fit(make_ppo(k=1, updates=UpdateSchedule(minibatch=3)), as_loader(batch))


# Advantages


def by_hand(rewards: list[float], groups: list[int], rule: str) -> list[float]:
    """One number per response, by loops."""
    mean_of_all = sum(rewards) / len(rewards)
    std_of_all = math.sqrt(sum((r - mean_of_all) ** 2 for r in rewards) / (len(rewards) - 1))
    found = []
    for i, group in enumerate(groups):
        mates = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = sum(mates) / len(mates)
        std = math.sqrt(sum((r - mean) ** 2 for r in mates) / (len(mates) - 1))
        found.append(
            {
                "loo": rewards[i] - (sum(mates) - rewards[i]) / (len(mates) - 1),
                "group": (rewards[i] - mean) / (std + 1e-4),
                "batch": (rewards[i] - mean) / (std_of_all + 1e-4),
                "plain": rewards[i] - mean,
            }[rule]
        )
    return found


ESTIMATORS = {
    "loo": BanditAdvantage(baseline=LeaveOneOut()),
    "group": GroupAdvantage(scale=GroupStd()),
    "batch": GroupAdvantage(scale=BatchStd()),
    "plain": GroupAdvantage(scale=NoScale()),
}


@pytest.mark.parametrize("in_loss", [False, True])
@pytest.mark.parametrize("rule", ESTIMATORS)
def test_advantages_are_counted_by_hand(make_ppo, make_trainer, as_loader, left_padded, rule, in_loss):
    """Of the reward less β·KL, or of the score alone where the KL is in the loss."""
    term = {"kl_term": KLInLoss()} if in_loss else {}
    module = make_ppo(reward=Spy(), advantage=ESTIMATORS[rule], beta=FixedKL(coef=0.3), level=TokenLevel(), **term)
    drift(module)
    kept, original = [], module.credit
    module.credit = lambda *a, **o: kept.append(original(*a, **o)) or kept[-1]
    make_trainer().fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    (experience,) = kept
    rollout = experience.rollout
    kl = [
        sum(float(rollout.logprobs[i, t] - rollout.ref_logprobs[i, t]) for t in range(int(rollout.lengths[i])))
        for i in range(24)
    ]
    assert max(map(abs, kl)) > 1e-2
    rewards = [math.sin(i) - (0.0 if in_loss else 0.3 * kl[i]) for i in range(24)]
    for i, wanted in enumerate(by_hand(rewards, [i // K for i in range(24)], rule)):
        for t in range(rollout.response_mask.shape[1]):
            expected = wanted if rollout.response_mask[i, t] else 0.0
            assert float(experience.advantages[i, t]) == pytest.approx(expected, abs=1e-9)


class Halves(Reward):
    """Prompts of an even number earn a constant, the others something of each response."""

    def __call__(self, rollout, rows):
        parity = torch.tensor([int(row["prompt"][1:]) % 2 for row in rows], dtype=torch.float64)
        return 1.0 + parity * torch.arange(len(rows), dtype=torch.float64)


def test_flat_groups_are_counted(make_ppo, make_trainer, as_loader, left_padded, recorder):
    batch = [{"prompts": left_padded(RAGGED[:6])}]
    for k, share in ((K, 0.5), (1, 0.0)):  # a single response says nothing of a group
        make_trainer(callbacks=[recorder]).fit(make_ppo(k=k, reward=Halves()), as_loader(batch))
        assert recorder.steps[-1]["objective/flat_groups"] == share


def test_flat_groups_teach_nothing(make_ppo, make_trainer, as_loader, left_padded):
    """Without them GRPO takes the same step, but for the count that divides it."""

    def step(prompts, rows):
        module = make_ppo(
            reward=Halves(),
            advantage=GroupAdvantage(scale=NoScale()),
            beta=FixedKL(coef=0.0),
            reduction=SeqMeanTokenSum(),
            updates=UpdateSchedule(max_grad_norm=None),
        )
        module.configure_model()
        before = flat(module.policy)
        batch = {"prompts": left_padded(prompts, rows=rows)}
        make_trainer().fit(module, as_loader([batch]))
        return flat(module.policy) - before

    flat_only = step(RAGGED[:1], [{"prompt": "p0"}])
    assert distance(flat_only, torch.zeros_like(flat_only)) == 0.0
    moved = step(RAGGED[:1], [{"prompt": "p1"}])
    assert distance(moved, torch.zeros_like(moved)) > 1e-4
    both = step([RAGGED[0], RAGGED[3]], [{"prompt": "p1"}, {"prompt": "p0"}])
    assert distance(2 * both, moved) < 1e-9


@pytest.mark.parametrize(
    "options",
    [
        {
            "advantage": ESTIMATORS["group"],
            "level": TokenLevel(),
            "reduction": SeqMeanTokenMean(),
            "kl_term": KLInLoss(),
        },
        {"advantage": ESTIMATORS["batch"], "level": TokenLevel(), "reduction": SeqMeanTokenSumNorm(length=5)},
        {"advantage": ESTIMATORS["loo"]},
        {"advantage": Whitened(estimator=RewardToGo()), "level": TokenLevel()},
    ],
    ids=["grpo", "batch-std", "rloo", "reinforce++"],
)
def test_microbatches_change_no_weight(make_ppo, make_trainer, as_loader, left_padded, options):
    """Pieces of 5 of a minibatch of 12 cut prompts with 3 responses apart."""

    def run(microbatch):
        module = make_ppo(updates=UpdateSchedule(epochs=2, minibatch=12, microbatch=microbatch), **options)
        make_trainer().fit(module, as_loader([{"prompts": left_padded(RAGGED)}] * 2))
        return flat(module.policy)

    assert distance(run(None), run(5)) < 1e-10


def test_running_mean_follows_the_rollouts(make_ppo, make_trainer, as_loader, left_padded, recorder):
    module = make_ppo(advantage=BanditAdvantage(baseline=RunningMean(decay=0.75)))
    kept, original = [], module.credit
    module.credit = lambda *a, **o: kept.append(original(*a, **o)) or kept[-1]
    make_trainer(callbacks=[recorder]).fit(module, as_loader([{"prompts": left_padded(RAGGED)}] * 3))
    means = [step["objective/rlhf_reward"] for step in recorder.steps]
    assert len(set(means)) == 3
    m, weight, bases = 0.0, 0.0, []
    for mean in means:
        bases.append(m / weight if weight else 0.0)
        m, weight = 0.75 * m + 0.25 * mean, 0.75 * weight + 0.25
    for experience, base in zip(kept, bases, strict=True):
        found = experience.returns[:, 0] - experience.advantages[:, 0]
        assert found.tolist() == pytest.approx([base] * 24, abs=1e-6)  # means are logged in float32
    baseline = module.algorithm.advantage.baseline
    assert (baseline.mean, baseline.weight) == (pytest.approx(m, abs=1e-6), pytest.approx(weight, abs=1e-12))


# Data


@pytest.fixture
def files(write_rows):
    letters = "abcdefghijk"
    prompts = write_rows("prompts.jsonl", [{"prompt": f"{x} b"[: 1 + 2 * (i % 2)]} for i, x in enumerate(letters)])
    return prompts, write_rows("texts.jsonl", [{"text": f"{x} m n o p"} for x in letters] * 3)


@pytest.mark.parametrize(("k", "ratio", "texts"), [(1, 1.0, 4), (3, 1.0, 12), (2, 1.5, 12), (3, 0.25, 3)])
def test_pretraining_texts_go_with_the_responses(
    make_ppo, make_trainer, make_tokenizer, files, recorder, k, ratio, texts
):
    class Counting(Callback):
        seen = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.seen.append((len(batch["prompts"].tokens), len(batch["pretrain"].tokens)))

    module = make_ppo(k=k, tokenizer=make_tokenizer(), ptx_coef=0.1)
    data = PromptDataModule(files[0], pretrain=files[1], batch_size=4, pretrain_ratio=ratio, text_tokens=6)
    counting = Counting()
    counting.seen.clear()
    make_trainer(callbacks=[counting], limit_train_batches=2).fit(module, data)
    assert counting.seen == [(4, texts)] * 2
    assert module.episodes == 2 * 4 * k


def test_pretraining_ratio_that_gives_a_text_per_rollout_is_taken(make_ppo, make_trainer, make_tokenizer, files):
    module = make_ppo(k=8, tokenizer=make_tokenizer(), ptx_coef=0.1)
    data = PromptDataModule(files[0], pretrain=files[1], batch_size=1, pretrain_ratio=0.25, text_tokens=6)
    make_trainer(limit_train_batches=1).fit(module, data)
    assert module.iteration == 1
    module = make_ppo(k=1, tokenizer=make_tokenizer(), ptx_coef=0.1)
    with pytest.raises(ValueError, match="at least one text per rollout: got 0.25 for 1 responses; raise it to 1"):
        make_trainer(limit_train_batches=1).fit(module, data)


# Interrupted = uninterrupted


def running_mean(make_ppo, tokenizer):
    return make_ppo(
        k=2,
        tokenizer=tokenizer,
        beta=AdaptiveKL(coef=0.1, target=0.5, horizon=50.0),
        advantage=BanditAdvantage(baseline=RunningMean(decay=0.8)),
        updates=UpdateSchedule(epochs=2, minibatch=4),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        schedule=LinearSchedule(warmup=1, floor=0.5),
    )


def truncated_weights(make_ppo, tokenizer):
    return make_ppo(
        k=2,
        tokenizer=tokenizer,
        generation=SamplingParams(max_new_tokens=5, samples_per_prompt=2, dtype="bfloat16"),
        beta=AdaptiveKL(coef=0.1, target=0.5, horizon=50.0),
        kl_term=KLInLoss(),
        advantage=GroupAdvantage(),
        surrogate=TruncatedIS(surrogate=KLPen(coef=1.0, target=1e-3), cap=1.5),
        updates=UpdateSchedule(minibatch=4),
        level=TokenLevel(),
        reduction=SeqMeanTokenMean(),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        ptx_coef=0.3,
    )


def whitened_running_mean(make_ppo, tokenizer):
    return make_ppo(
        k=2,
        tokenizer=tokenizer,
        advantage=Whitened(estimator=BanditAdvantage(baseline=RunningMean(decay=0.8))),
        surrogate=TruncatedIS(surrogate=Clip(), cap=1.5),
        optimizer=partial(torch.optim.Adam, lr=0.01),
    )


class Save(Callback):
    """A checkpoint in the middle of the second epoch, after 5 of 9 rollouts."""

    def __init__(self, path) -> None:
        self.path, self.count = path, 0

    def on_train_batch_end(self, trainer, *_):
        self.count += 1
        if self.count == 5:
            trainer.save_checkpoint(self.path)


@pytest.mark.slow
@pytest.mark.parametrize("build", [running_mean, truncated_weights, whitened_running_mean])
def test_resumed_training_equals_uninterrupted(make_ppo, make_trainer, make_tokenizer, files, tmp_path, build):
    def data():
        return PromptDataModule(files[0], pretrain=files[1], batch_size=4, pretrain_ratio=0.5, text_tokens=6)

    path, tokenizer = tmp_path / "half.ckpt", make_tokenizer()
    whole = build(make_ppo, tokenizer)
    make_trainer(max_epochs=3, callbacks=[Save(path)]).fit(whole, data())
    saved = torch.load(path, weights_only=True)
    assert saved["rlhf"]["iteration"] == 5
    resumed = build(make_ppo, tokenizer)
    make_trainer(max_epochs=3).fit(resumed, data(), ckpt_path=path)
    assert (resumed.iteration, resumed.episodes) == (whole.iteration, whole.episodes) == (9, 72)
    assert torch.equal(flat(resumed.policy), flat(whole.policy))
    for name in ("algorithm",):
        now, before = getattr(resumed, name).state(), saved["rlhf"][name]
        assert now == getattr(whole, name).state()
        assert all(now[number] != before[number] for number in now)  # it moved after the resumption, too
        assert now != getattr(build(make_ppo, tokenizer), name).state() or not now
    forgetful = build(make_ppo, tokenizer)  # negative control: the weights alone do not make the run
    forgetful.on_load_checkpoint = lambda checkpoint: None
    make_trainer(max_epochs=3).fit(forgetful, data(), ckpt_path=path)
    assert distance(flat(forgetful.policy), flat(whole.policy)) > 1e-6


def test_checkpoint_holds_the_running_mean(make_ppo, make_trainer, as_loader, left_padded, tmp_path):
    def make(**options):
        return make_ppo(advantage=BanditAdvantage(baseline=RunningMean(**options)))

    batches = [{"prompts": left_padded(RAGGED)}] * 2
    module, trainer = make(), make_trainer()
    trainer.fit(module, as_loader(batches))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    kept = torch.load(tmp_path / "x.ckpt", weights_only=True)["rlhf"]["algorithm"]
    assert kept.keys() == {"advantage.baseline.mean", "advantage.baseline.weight"}
    assert kept["advantage.baseline.weight"] == pytest.approx(1 - 0.9**2, abs=1e-12)
    with pytest.raises(ValueError, match="RunningMean"):
        make_trainer(max_epochs=2).fit(make_ppo(), as_loader(batches), ckpt_path=tmp_path / "x.ckpt")
