"""Validation, test and prediction of PPOModule on held-out prompts and texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from gathered import gathered
from lightning.pytorch import Callback

from lightning_rlhf.core import ConstantSchedule, TruncatedScore
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.rewards import Reward
from lightning_rlhf.types import Rollout

PROMPTS = [[12, 13], [10], [14, 15, 16, 11], [17], [20, 21, 22], [23, 11], [10, 12], [33]]
TEXTS = [[12, 13, 14, 0], [10, 11, 0], [14, 15, 16, 11, 30, 0], [17, 0], [20, 21, 22, 0]]
NAMES = {"reward", "kl", "entropy", "response_length", "eos_rate"}
ENDS = [0, 5, 9, 14, 21, 30]


class Kept(Reward):
    """Keeps the rollouts it scores; the score is a number of the row."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []

    def __call__(self, rollout, rows):
        self.rollouts.append(rollout)
        return torch.tensor([float(len(row["prompt"])) for row in rows])


@pytest.fixture
def make_ppo(make_lm):
    def make(kind: str = "gpt2", **options) -> PPOModule:
        usual = {
            "policy": make_lm(kind),
            "reward": Kept(),
            "generation": SamplingParams(max_new_tokens=6, temperature=0.8),
        }
        usual |= {"optimizer": partial(torch.optim.SGD, lr=0.1), "schedule": ConstantSchedule(), "shaping": ()}
        network = (usual | options)["policy"]
        network.generation_config.eos_token_id = ENDS  # some responses end, some do not
        return PPOModule(**gathered(**(usual | options)))

    return make


def rows(count: int, start: int = 0) -> list[dict]:
    return [{"prompt": "x" * (start + i)} for i in range(count)]


def perturb(module: PPOModule, scale: float = 0.05) -> None:
    module.configure_model()
    with torch.no_grad():
        for p in module.policy.parameters():
            p.add_(scale * torch.ones_like(p).cumsum(0).cos())


def by_hand(network, rollout: Rollout, temperature: float, ends: Sequence[int] = ENDS) -> list[dict[str, float]]:
    """Per response: log π, length and whether it ended, from one unpadded pass a row."""
    found = []
    for i in range(len(rollout)):
        tokens = rollout.tokens[i][rollout.attention_mask[i]].tolist()
        n = int(rollout.response_mask[i].sum())
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([tokens])).logits[0].double() / temperature
        logprobs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).flatten()
        found.append({"logprob": float(logprobs[-n:].sum()), "length": n, "ended": tokens[-1] in ends})
    return found


def mean(numbers) -> float:
    numbers = list(numbers)
    return math.fsum(numbers) / len(numbers)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("stage", "prefix"), [("validate", "eval"), ("test", "test")])
def test_numbers_are_counted_by_hand(make_ppo, make_lm, make_trainer, as_loader, left_padded, kind, stage, prefix):
    """Two batches of unequal size, a policy that has left its reference."""
    module = make_ppo(kind)
    perturb(module)
    batches = [left_padded(PROMPTS[:5], rows=rows(5)), left_padded(PROMPTS[5:], rows=rows(3, start=5))]
    (found,) = getattr(make_trainer(), stage)(module, as_loader(batches), verbose=False)
    assert found.keys() == {f"{prefix}/{name}" for name in NAMES}
    policy, reference = module.policy.network, make_lm(kind).double().eval()
    ours = [row for rollout in module.reward.rollouts for row in by_hand(policy, rollout, 0.8)]
    theirs = [row for rollout in module.reward.rollouts for row in by_hand(reference, rollout, 0.8)]
    assert len(ours) == 8
    assert 0 < sum(row["ended"] for row in ours) < 8
    assert len({row["length"] for row in ours}) > 2
    log_ratios = [a["logprob"] - b["logprob"] for a, b in zip(ours, theirs, strict=True)]
    assert found[f"{prefix}/reward"] == pytest.approx(3.5)  # (0 + … + 7) / 8
    # what is logged went through a float32 metric
    assert found[f"{prefix}/kl"] == pytest.approx(mean(log_ratios), abs=1e-5)
    assert found[f"{prefix}/entropy"] == pytest.approx(-mean(row["logprob"] for row in ours), rel=1e-6)
    assert found[f"{prefix}/response_length"] == pytest.approx(mean(row["length"] for row in ours))
    assert found[f"{prefix}/eos_rate"] == pytest.approx(mean(row["ended"] for row in ours))
    assert abs(found[f"{prefix}/kl"]) > 1e-3


def test_kl_is_zero_at_the_reference_and_positive_away_from_it(make_ppo, make_trainer, as_loader, left_padded):
    """Of 256 responses; a single log-ratio may be negative, their mean is the KL."""
    batches = [left_padded(PROMPTS * 32, rows=rows(256))]
    found = []
    for scale in (0.0, 0.03, 0.1):
        module = make_ppo()
        perturb(module, scale)
        found.append(make_trainer().validate(module, as_loader(batches), verbose=False)[0]["eval/kl"])
    assert found[0] == pytest.approx(0.0, abs=1e-12)
    assert 0.0 < found[1] < found[2]


def test_missing_end_token_counts_in_the_reward(make_ppo, make_trainer, as_loader, left_padded):
    batch = left_padded(PROMPTS, rows=rows(8))
    module = make_ppo(shaping=(TruncatedScore(value=-10.0),))
    (found,) = make_trainer().validate(module, as_loader([batch]), verbose=False)
    ended = module.reward.rollouts[0].ended.tolist()
    assert 0 < sum(ended) < 8
    assert found["eval/reward"] == pytest.approx(mean(i if end else -10.0 for i, end in enumerate(ended)))


def test_texts_alone_give_their_loss_alone(make_ppo, make_trainer, as_loader, right_padded):
    module = make_ppo()
    batches = [right_padded(TEXTS[:2]), right_padded(TEXTS[2:])]
    (found,) = make_trainer().validate(module, as_loader(batches), verbose=False)
    network, losses = module.policy.network, []
    for text in TEXTS:
        with torch.no_grad():
            logprobs = network(input_ids=torch.tensor([text])).logits[0].log_softmax(-1)  # temperature 1: it is a text
        losses += [-float(logprobs[i - 1, text[i]]) for i in range(1, len(text))]
    assert found.keys() == {"eval/ptx_loss"}
    assert found["eval/ptx_loss"] == pytest.approx(mean(losses), rel=1e-6)


@pytest.mark.parametrize(("stage", "prefix"), [("validate", "eval"), ("test", "test")])
def test_prompts_and_texts_are_told_apart(make_ppo, make_trainer, as_loader, left_padded, right_padded, stage, prefix):
    prompts, texts = as_loader([left_padded(PROMPTS, rows=rows(8))]), as_loader([right_padded(TEXTS)])
    expected = {f"{prefix}/{name}" for name in NAMES | {"ptx_loss"}}
    both = [
        getattr(make_trainer(), stage)(make_ppo(), order, verbose=False)
        for order in ([prompts, texts], [texts, prompts])
    ]
    for found in both:
        assert set().union(*found) == expected
    assert both[0][0] == pytest.approx(both[1][0], abs=1e-12)  # the order of the loaders is no matter


def test_filler_rows_count_nowhere(make_ppo, make_trainer, as_loader, left_padded):
    """A row repeated to fill the batch: neither its score nor its length nor its record."""
    counts = [True] * 6 + [False] * 2
    whole = left_padded(PROMPTS, rows=[*rows(6), {"prompt": "x" * 900}, {"prompt": "x" * 900}])
    modules = [make_ppo(), make_ppo(), make_ppo()]
    for module in modules:
        perturb(module)
    (full,) = make_trainer().validate(modules[0], as_loader([whole]), verbose=False)
    (filled,) = make_trainer().validate(
        modules[1], as_loader([whole._replace(is_real=torch.tensor(counts))]), verbose=False
    )
    assert full["eval/reward"] == pytest.approx((15 + 1800) / 8)
    assert filled["eval/reward"] == pytest.approx(15 / 6)
    rollout = modules[1].reward.rollouts[0]
    lengths = rollout.response_mask.sum(1)[:6].tolist()
    assert filled["eval/response_length"] == pytest.approx(mean(lengths))
    assert filled["eval/eos_rate"] == pytest.approx(mean(rollout.ended[:6].tolist()))
    log_ratio = (rollout.logprobs - rollout.ref_logprobs)[:6].sum(1)
    assert filled["eval/kl"] == pytest.approx(mean(log_ratio.tolist()), abs=1e-6)
    assert filled["eval/kl"] != pytest.approx(full["eval/kl"], abs=1e-6)
    batch = whole._replace(is_real=torch.tensor([False, True, True, False, True, True, True, True]))
    (records,) = make_trainer().predict(modules[2], as_loader([batch]))
    assert [len(record["prompt"]) for record in records] == [1, 2, 4, 5, 900, 900]


def test_predictions_are_what_was_measured(make_ppo, make_lm, make_trainer, as_loader, left_padded, toy_tokenizer):
    module = make_ppo(tokenizer=toy_tokenizer)
    perturb(module)
    (records,) = make_trainer().predict(module, as_loader([left_padded(PROMPTS, rows=rows(8))]))
    (rollout,) = module.reward.rollouts
    ours = by_hand(module.policy.network, rollout, 0.8, ends=[*ENDS, 4])  # the template ends a turn with 4
    theirs = by_hand(make_lm().double().eval(), rollout, 0.8)
    letters = {10 + i: chr(ord("a") + i) for i in range(26)} | {5: "user", 6: "assistant", 7: "system", 2: "<unk>"}
    for i, record in enumerate(records):
        assert (record["length"], record["ended"]) == (ours[i]["length"], ours[i]["ended"])
        assert record["kl"] == pytest.approx(ours[i]["logprob"] - theirs[i]["logprob"], abs=1e-9)
        assert record["score"] == float(i)
        tokens = rollout.tokens[i, rollout.prompt_width :][: record["length"]].tolist()
        assert record["response"].split() == [letters[token] for token in tokens if token in letters]


def test_repeated_validation_repeats_itself(make_ppo, make_trainer, as_loader, left_padded, right_padded):
    """Also by another trainer, after other random numbers, and after training steps that are undone."""
    loaders = [as_loader([left_padded(PROMPTS, rows=rows(8))] * 2), as_loader([right_padded(TEXTS)])]
    module = make_ppo()
    first = make_trainer().validate(module, loaders, verbose=False)
    torch.rand(7)
    assert make_trainer().validate(module, loaders, verbose=False) == first
    torch.manual_seed(99)
    assert make_trainer().validate(make_ppo(), loaders, verbose=False) == first
    module.iteration = 5
    assert make_trainer().validate(module, loaders, verbose=False) == first
    other = make_ppo(generation=SamplingParams(max_new_tokens=6, temperature=0.8, seed=1))
    assert make_trainer().validate(other, loaders, verbose=False) != first


def test_batches_of_a_validation_draw_different_numbers(make_ppo, make_trainer, as_loader, left_padded):
    module = make_ppo()
    batch = left_padded(PROMPTS, rows=rows(8))
    make_trainer().validate(module, as_loader([batch, batch]), verbose=False)
    first, second = (rollout.tokens[:, 4:].tolist() for rollout in module.reward.rollouts)
    assert first != second


def test_validation_and_training_draw_different_numbers(make_ppo, make_trainer, as_loader, left_padded):
    batch = left_padded(PROMPTS, rows=rows(8))
    module = make_ppo()
    make_trainer(val_check_interval=1, num_sanity_val_steps=1).fit(
        module, as_loader([{"prompts": batch}]), as_loader([batch])
    )
    sanity, train, _ = (rollout.tokens[:, 4:].tolist() for rollout in module.reward.rollouts)
    assert sanity != train


def test_validation_does_not_disturb_training(make_ppo, make_trainer, as_loader, left_padded, right_padded):
    def run(validate: bool, seed: int = 0):
        module = make_ppo(generation=SamplingParams(max_new_tokens=6, temperature=0.8, seed=seed))
        batches = as_loader([{"prompts": left_padded(PROMPTS, rows=rows(8))}] * 3)
        held_out = [as_loader([left_padded(PROMPTS[::-1], rows=rows(8))] * 2), as_loader([right_padded(TEXTS)])]
        make_trainer(val_check_interval=1).fit(module, batches, held_out if validate else None)
        assert len(module.reward.rollouts) == (9 if validate else 3)
        return torch.cat([p.detach().flatten() for p in module.policy.parameters()])

    assert torch.equal(run(True), run(False))
    assert not torch.equal(run(True, seed=1), run(False))


def test_validation_leaves_no_gradient_and_no_change(make_ppo, make_trainer, as_loader, left_padded, right_padded):
    module = make_ppo()
    module.configure_model()
    module.double()
    before = {name: p.clone() for name, p in module.policy.named_parameters()}
    loaders = [as_loader([left_padded(PROMPTS, rows=rows(8))]), as_loader([right_padded(TEXTS)])]
    make_trainer().validate(module, loaders, verbose=False)
    for name, p in module.policy.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad
        assert p.grad is None
    assert (module.iteration, module.episodes) == (0, 0)


def test_interrupted_validation_leaves_nothing_behind(make_ppo, make_trainer, as_loader, left_padded):
    class Break(Callback):
        def on_validation_batch_end(self, *_):
            raise RuntimeError("broken")

    module = make_ppo()
    high = left_padded(PROMPTS, rows=rows(8, start=100))
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(callbacks=[Break()]).validate(module, as_loader([high]), verbose=False)
    low = as_loader([left_padded(PROMPTS, rows=rows(8))])
    assert make_trainer().validate(module, low, verbose=False)[0]["eval/reward"] == pytest.approx(3.5)
