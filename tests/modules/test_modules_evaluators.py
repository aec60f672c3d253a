"""Win rate, best-of-n, gold reward and alignment tax, as `validate` logs them, against naive loops."""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations

import pytest
import torch
from gathered import gathered

from lightning_rlhf import AlignmentTax, BestOfN, Evaluator, GoldReward, PPOModule, Reward, SamplingParams, WinRate
from lightning_rlhf.core import ConstantSchedule, length_controlled
from lightning_rlhf.models import ModelSource

PROMPTS = [[12, 13], [10], [14, 15, 16, 11], [17], [20, 21, 22], [23, 11], [10, 12], [33]]
TEXTS = [[12, 13, 14, 0], [10, 11, 0], [14, 15, 16, 11, 30, 0], [17, 0], [20, 21, 22, 0]]
ENDS = [0, 5, 9, 14, 21, 30]


class Kept(Reward):
    """A number of the response's tokens, with ties; keeps what it scored."""

    def __init__(self, factor: int = 3, modulus: int = 4) -> None:
        self.factor, self.modulus, self.seen = factor, modulus, []

    def __call__(self, rollout, rows):
        tokens = torch.where(rollout.response_mask, rollout.tokens[:, rollout.prompt_width :], 0).sum(1)
        scores = (self.factor * tokens % self.modulus).double()
        texts = [
            tuple(rollout.tokens[i, rollout.prompt_width :][: int(n)].tolist()) for i, n in enumerate(rollout.lengths)
        ]
        self.seen.append((texts, scores.tolist()))
        return scores


@pytest.fixture
def make_ppo(make_lm):
    def make(**options) -> PPOModule:
        usual = {"policy": make_lm(end=ENDS), "reward": Kept(), "generation": SamplingParams(max_new_tokens=6)}
        usual |= {"optimizer": partial(torch.optim.SGD, lr=0.1), "schedule": ConstantSchedule(), "shaping": ()}
        return PPOModule(**gathered(**(usual | options)))

    return make


def leave(module: PPOModule) -> PPOModule:
    """The reference, a little."""
    module.configure_model()
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, module.policy.parameters()):
            p.add_(0.03 * torch.ones_like(p).cumsum(0).cos())
    return module


@pytest.fixture
def validate(make_trainer, as_loader, left_padded, right_padded):
    def run(module: PPOModule, *, texts: bool = False, rows=None, counts=None, stage: str = "validate") -> dict:
        batches = [left_padded(PROMPTS[:5], rows=rows and rows[:5]), left_padded(PROMPTS[5:], rows=rows and rows[5:])]
        if counts is not None:
            batches = [b._replace(is_real=c) for b, c in zip(batches, torch.tensor(counts).split(5), strict=True)]
        loaders = [as_loader(batches)] + (
            [as_loader([right_padded(TEXTS[:2]), right_padded(TEXTS[2:])])] if texts else []
        )
        found = getattr(make_trainer(), stage)(module, loaders, verbose=False)
        return {name.partition("/")[2].split("/dataloader")[0]: x for part in found for name, x in part.items()}

    return run


def mean(numbers) -> float:
    numbers = list(numbers)
    return math.fsum(numbers) / len(numbers)


def error(numbers) -> float:
    m, n = mean(numbers), len(numbers)
    return math.sqrt(math.fsum((x - m) ** 2 for x in numbers) / (n - 1) / n)


def played(reward: Kept, k: int) -> list[tuple[tuple, float, list[tuple], list[float]]]:
    """Per prompt the policy's response and score and the reference's k, from what the reward was asked."""
    games = []
    for (ours, scores), (theirs, others) in zip(reward.seen[::2], reward.seen[1::2], strict=True):
        for i, response in enumerate(ours):
            games.append((response, scores[i], theirs[k * i : k * i + k], others[k * i : k * i + k]))
    return games


def test_win_rate_is_counted_by_hand(make_ppo, validate):
    module = leave(make_ppo(evaluations=[WinRate(samples=3)]))
    found = validate(module)
    games = played(module.reward, 3)
    assert len(games) == 8
    points = [[(a > b) + (a == b) / 2 for b in theirs] for _, a, _, theirs in games]
    gaps = [[len(ours) - len(other) for other in theirs] for ours, _, theirs, _ in games]
    flat, lengths = sum(points, []), sum(gaps, [])
    assert {0.0, 0.5, 1.0} == set(flat)
    assert found["win_rate"] == pytest.approx(mean(flat))
    assert found["win_rate_se"] == pytest.approx(error([mean(row) for row in points]))
    assert found["win_rate_length_difference"] == pytest.approx(mean(lengths))
    expected = length_controlled(torch.tensor(flat), torch.tensor(lengths))
    assert found["win_rate_length_controlled"] == pytest.approx(expected)
    assert abs(expected - mean(flat)) > 1e-3


def test_judge_is_asked_in_both_orders_with_text_and_columns(make_ppo, validate, toy_tokenizer):
    asked = []

    def judge(prompts, first, second, wanted):
        asked.append((prompts, first, second, wanted))
        better = [w * (len(a) > len(b)) + (1 - w) / 2 for a, b, w in zip(first, second, wanted, strict=True)]
        return [min(1.0, x + 0.125) for x in better]  # it likes what stands first

    rows = [{"prompt": f"p{i}", "wanted": float(i % 2), "other": i} for i in range(8)]
    module = leave(make_ppo(tokenizer=toy_tokenizer, evaluations=[WinRate(judge=judge, samples=2, name="j")]))
    found = validate(module, rows=rows)
    assert len(asked) == 4  # two batches in two orders
    preferences, firsts = [], []
    for forward, backward in zip(asked[::2], asked[1::2], strict=True):
        assert (forward[1], forward[2]) == (backward[2], backward[1])
        for (_, a, b, w), (_, c, d, _) in zip(zip(*forward, strict=True), zip(*backward, strict=True), strict=True):
            one = min(1.0, w * (len(a) > len(b)) + (1 - w) / 2 + 0.125)
            two = min(1.0, w * (len(c) > len(d)) + (1 - w) / 2 + 0.125)
            preferences.append((one + 1 - two) / 2)
            firsts.append((one + two) / 2)
    assert [p for call in asked[::2] for p in call[0]] == [f"p{i}" for i in range(8) for _ in range(2)]
    letters = {10 + i: chr(ord("a") + i) for i in range(26)} | {5: "user", 6: "assistant", 7: "system", 2: "<unk>"}
    texts = [text for call in asked[::2] for text in call[1]]
    responses = [response for response, *_ in played(module.reward, 2) for _ in range(2)]
    assert [text.split() for text in texts] == [[letters[t] for t in r if t in letters] for r in responses]
    assert found["j"] == pytest.approx(mean(preferences))
    assert found["j_first"] == pytest.approx(mean(firsts))
    assert found["j_first"] > 0.5


def test_liking_for_a_position_cancels(make_ppo, validate, toy_tokenizer):
    def always_first(prompts, first, second):
        return [1.0] * len(first)

    found = validate(leave(make_ppo(tokenizer=toy_tokenizer, evaluations=[WinRate(judge=always_first)])))
    assert (found["win_rate"], found["win_rate_first"], found["win_rate_se"]) == (0.5, 1.0, 0.0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n: [0.5] * (n + 1), r"must return one number per pair: got \(6,\) for 5"),
        (lambda n: [1.5] * n, "from 0 to 1: got 1.5"),
        (lambda n: [math.nan] * n, "from 0 to 1: got nan"),
        (lambda n: "first", "must return 5 numbers: got str: first"),
        (lambda n: 1 / 0, "`win_rate` failed with ZeroDivisionError"),
    ],
)
def test_judge_that_gives_no_probabilities_is_told_so(make_ppo, validate, toy_tokenizer, answer, message):
    def judge(prompts, first, second):
        return answer(len(first))

    with pytest.raises(ValueError, match=message):
        validate(make_ppo(tokenizer=toy_tokenizer, evaluations=[WinRate(judge=judge)]))


def test_judge_needs_a_tokenizer(make_ppo, validate):
    with pytest.raises(ValueError, match="there is no tokenizer"):
        validate(make_ppo(evaluations=[WinRate(judge=lambda prompts, first, second: [0.5] * len(first))]))


def test_best_of_n_is_counted_by_hand(make_ppo, validate):
    module = make_ppo(reward=Kept(modulus=11), evaluations=[BestOfN(n=(4, 1, 2))])
    found = validate(module)
    games = played(module.reward, 4)
    best = {n: [mean(map(max, combinations(theirs, n))) for *_, theirs in games] for n in (1, 2, 3, 4)}
    for n in (1, 2, 4):
        assert found[f"best_of_{n}/reward"] == pytest.approx(mean(best[n]), rel=1e-6)
        assert found[f"best_of_{n}/reward_se"] == pytest.approx(error(best[n]), rel=1e-6)
        assert found[f"best_of_{n}/kl"] == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-7)
    assert "best_of_3/reward" not in found
    # the policy is the reference: KL 0, n = 1
    assert found["best_of_n/equivalent"] == pytest.approx(1.0, abs=1e-6)
    assert found["best_of_n/reward_at_equal_kl"] == pytest.approx(mean(best[1]), rel=1e-6)
    lead = [score - first for (_, score, _, _), first in zip(games, best[1], strict=True)]
    assert found["best_of_n/lead"] == pytest.approx(mean(lead), rel=1e-5)
    assert found["best_of_n/lead_se"] == pytest.approx(error(lead), rel=1e-6)


def notes(**columns) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}


def test_policy_is_compared_at_equal_kl_and_at_equal_reward():
    """Two prompts, three responses to each: means of the best of 1, 2, 3 are 2, 3 and 3.5."""
    reference = [[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]]  # best of 2 of (0, 1, 2): (1 + 2 + 2)/3 = 5/3
    curve = [2.0, (5 / 3 + 11 / 3) / 2, 3.0]
    kls = [0.0, math.log(2) - 1 / 2, math.log(3) - 2 / 3]
    kl = (kls[1] + kls[2]) / 2  # half way between best-of-2 and best-of-3
    found = BestOfN(n=(3,)).conclude(notes(score=[2.5, 2.5], kl=[kl - 1, kl + 1], reference=reference))
    assert 2.0 < found["best_of_n/equivalent"] < 3.0
    assert found["best_of_n/reward_at_equal_kl"] == pytest.approx((curve[1] + curve[2]) / 2)
    assert found["best_of_n/lead"] == pytest.approx(2.5 - (curve[1] + curve[2]) / 2)
    share = (2.5 - curve[0]) / (curve[1] - curve[0])  # of the way from n = 1 to n = 2
    assert found["best_of_n/kl_at_equal_reward"] == pytest.approx(share * kls[1])
    best = BestOfN(n=(3,)).conclude(notes(score=[9.0, 9.0], kl=[50.0, 50.0], reference=reference))
    assert best["best_of_n/equivalent"] == pytest.approx(math.exp(51), rel=1e-6)  # log n ≈ KL + 1
    assert not best.keys() & {"best_of_n/lead", "best_of_n/reward_at_equal_kl", "best_of_n/kl_at_equal_reward"}
    worse = BestOfN(n=(3,)).conclude(notes(score=[0.0, 0.0], kl=[-0.1, 0.0], reference=reference))  # a sampled KL
    assert (worse["best_of_n/kl_at_equal_reward"], worse["best_of_n/lead"]) == (0.0, -2.0)


def test_gold_reward_scores_the_same_responses(make_ppo, validate):
    module = leave(make_ppo(evaluations=[GoldReward(reward=Kept(factor=5, modulus=7))]))
    gold = module.evaluation.panel.given[0].reward
    found = validate(module)
    games, judged = played(module.reward, 1), played(gold, 1)
    assert [(g[0], g[2]) for g in games] == [(g[0], g[2]) for g in judged]
    ours, theirs, proxy = [g[1] for g in judged], [g[3][0] for g in judged], [g[1] for g in games]
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert found["gold/reward"] == pytest.approx(mean(ours))
    assert found["gold/reference_reward"] == pytest.approx(mean(theirs))
    assert found["gold/gain"] == found["gold/since_best"] == pytest.approx(mean(gains))  # the reference is the best yet
    assert found["gold/gain_se"] == pytest.approx(error(gains))
    assert found["gold/proxy_gain"] == pytest.approx(mean(p - g[3][0] for p, g in zip(proxy, games, strict=True)))
    centered = [(a - mean(ours), b - mean(proxy)) for a, b in zip(ours, proxy, strict=True)]
    scale = math.sqrt(sum(a * a for a, _ in centered) * sum(b * b for _, b in centered))
    assert found["gold/correlation"] == pytest.approx(sum(a * b for a, b in centered) / scale)


def test_over_optimization_is_a_rising_proxy_with_a_falling_gold():
    reference = {"reference_gold": [0.0] * 4, "reference_proxy": [0.0] * 4}
    good = notes(gold=[1.0, 2.0, 1.5, 1.5], proxy=[1.0, 1.0, 1.0, 1.0], **reference)
    gold = GoldReward(reward=Kept())
    assert gold.conclude(good)["gold/since_best"] == 1.5  # less the reference
    assert gold.conclude(good)["gold/overoptimized"] == 0.0
    after = gold.adapted(good)
    fallen = notes(gold=[0.1, 1.0, 0.5, 0.5], proxy=[2.0, 2.0, 3.0, 2.0], **reference)
    found = after.conclude(fallen)
    assert found["gold/since_best"] == pytest.approx(mean([-0.9, -1, -1, -1]))
    assert found["gold/since_best_se"] == pytest.approx(error([-0.9, -1, -1, -1]))
    assert found["gold/proxy_since_best"] == pytest.approx(1.25)
    assert found["gold/overoptimized"] == 1.0
    # controls: nothing remembered; the proxy falls, too; the fall is within two standard errors; a better gold
    assert gold.conclude(fallen)["gold/overoptimized"] == 0.0
    assert after.conclude(fallen | notes(proxy=[0.0, 1.0, 1.0, 0.0]))["gold/overoptimized"] == 0.0
    assert after.conclude(fallen | notes(gold=[-3.0, 5.0, 1.5, 1.5]))["gold/overoptimized"] == 0.0
    assert after.conclude(fallen | notes(gold=[3.0, 3.0, 1.5, 1.5]))["gold/overoptimized"] == 0.0
    assert after.adapted(fallen).conclude(fallen) == found  # the best stays the best
    below = notes(gold=[-1.0, -1.1, -1.0, -1.2], proxy=[1.0, 1.0, 1.0, 1.0], **reference)
    assert gold.conclude(below)["gold/overoptimized"] == 1.0  # than the reference
    assert (
        after.conclude(notes(gold=[1.0], proxy=[2.0], reference_gold=[0.5], reference_proxy=[0.0]))["gold/gain"] == 0.5
    )


def test_alignment_tax_is_counted_by_hand(make_ppo, make_lm, validate):
    module = leave(make_ppo(evaluations=[AlignmentTax()]))
    found = validate(module, texts=True)
    losses = []
    for network in (module.policy.network, make_lm(end=ENDS).double().eval()):
        of_texts = []
        for text in TEXTS:
            with torch.no_grad():
                logprobs = network(input_ids=torch.tensor([text])).logits[0].log_softmax(-1)
            of_texts.append(-math.fsum(float(logprobs[i - 1, text[i]]) for i in range(1, len(text))))
        losses.append(of_texts)
    tokens = [len(text) - 1 for text in TEXTS]
    extra = [a - b for a, b in zip(*losses, strict=True)]
    tax = sum(extra) / sum(tokens)
    residuals = [d - tax * n for d, n in zip(extra, tokens, strict=True)]
    assert found["ptx_loss_reference"] == pytest.approx(sum(losses[1]) / sum(tokens), rel=1e-6)
    assert found["alignment_tax"] == pytest.approx(tax, rel=1e-5)
    assert found["alignment_tax"] == pytest.approx(found["ptx_loss"] - found["ptx_loss_reference"], abs=1e-6)
    assert found["alignment_tax_se"] == pytest.approx(math.sqrt(sum(r * r for r in residuals) * 5 / 4) / sum(tokens))
    assert abs(tax) > 1e-3


ALL = (WinRate(samples=2), BestOfN(n=(1, 2)), AlignmentTax())


def test_reference_ties_with_itself_and_a_trained_policy_wins(
    make_ppo, token_reward, make_trainer, as_loader, left_padded
):
    """Of 256 prompts, within four standard errors; were both drawn with the same numbers, there would be no error."""
    evaluations = [WinRate(samples=2), BestOfN(n=(1, 4)), GoldReward(reward=token_reward())]
    adam = partial(torch.optim.Adam, lr=0.01)
    module = make_ppo(reward=token_reward(), evaluations=evaluations, optimizer=adam)
    held_out = as_loader([left_padded(PROMPTS * 32)])
    (before,) = make_trainer().validate(module, held_out, verbose=False)
    assert 0.015 < before["eval/win_rate_se"] < 0.03  # ½/√256 is 0.031
    assert abs(before["eval/win_rate"] - 0.5) < 4 * before["eval/win_rate_se"]
    assert abs(before["eval/best_of_n/lead"]) < 4 * before["eval/best_of_n/lead_se"]
    assert before["eval/best_of_4/reward"] > before["eval/best_of_1/reward"] + 0.5
    make_trainer().fit(module, as_loader([{"prompts": left_padded(PROMPTS * 8)}] * 20))
    (after,) = make_trainer().validate(module, held_out, verbose=False)
    assert after["eval/win_rate"] > 0.5 + 4 * after["eval/win_rate_se"]
    assert after["eval/gold/gain"] > 4 * after["eval/gold/gain_se"]
    same = ("best_of_4/reward", "best_of_1/reward", "gold/reference_reward")  # the reference has not moved
    assert [before[f"eval/{name}"] for name in same] == [after[f"eval/{name}"] for name in same]


def test_fillers_count_nowhere(make_ppo, validate, toy_tokenizer):
    counts = [True, False, True, True, True, False, False, True]
    asked = []

    def judge(prompts, first, second):
        asked.extend(prompts)
        return [0.5] * len(first)

    evaluations = [WinRate(), BestOfN(n=(2,)), GoldReward(reward=Kept(factor=5)), WinRate(judge=judge, name="judge")]
    module = leave(make_ppo(tokenizer=toy_tokenizer, evaluations=evaluations))
    found = validate(module, counts=counts, rows=[{"prompt": f"p{i}"} for i in range(8)])
    games = [game for game, count in zip(played(module.reward, 2), counts, strict=True) if count]
    assert found["win_rate"] == pytest.approx(mean((g[1] > g[3][0]) + (g[1] == g[3][0]) / 2 for g in games))
    assert found["best_of_2/reward"] == pytest.approx(mean(max(g[3]) for g in games))
    judged = [g for g, count in zip(played(evaluations[2].reward, 1), counts, strict=True) if count]
    assert found["gold/reward"] == pytest.approx(mean(g[1] for g in judged))
    assert set(asked) == {f"p{i}" for i, count in enumerate(counts) if count}


def test_responses_do_not_depend_on_who_else_asks(make_ppo, validate):
    found = [validate(make_ppo(evaluations=[WinRate(), *others])) for others in ((), (BestOfN(n=(5,)),))]
    assert found[0]["win_rate"] == found[1]["win_rate"]
    assert found[0]["win_rate_length_difference"] == found[1]["win_rate_length_difference"]
    slotted = make_ppo(evaluations=[WinRate()], generation=SamplingParams(max_new_tokens=6, slots=2))
    assert validate(slotted)["win_rate"] == found[0]["win_rate"]
    other = make_ppo(evaluations=[WinRate()], generation=SamplingParams(max_new_tokens=6, seed=1))
    assert validate(other)["win_rate_length_difference"] != found[0]["win_rate_length_difference"]


def test_reference_is_asked_once_in_a_run(make_ppo, make_trainer, as_loader, left_padded):
    module = make_ppo(evaluations=[WinRate(samples=2), GoldReward(reward=Kept(factor=5))])
    held_out = as_loader([left_padded(PROMPTS[:5]), left_padded(PROMPTS[5:])])
    (first,) = make_trainer().validate(module, held_out, verbose=False)
    assert [len(texts) for texts, _ in module.reward.seen] == [5, 10, 3, 6]
    assert make_trainer().validate(module, held_out, verbose=False) == [first]
    assert [len(texts) for texts, _ in module.reward.seen[4:]] == [5, 3]
    others = as_loader([left_padded(PROMPTS[:5]), left_padded([[11], [12, 14], [15]])])
    (found,) = make_trainer().validate(module, others, verbose=False)
    assert [len(texts) for texts, _ in module.reward.seen[6:]] == [5, 3, 6]  # the second batch is another
    (fresh,) = make_trainer().validate(make_ppo(evaluations=module.evaluation.panel.given), others, verbose=False)
    assert found == fresh != first
    columns = as_loader([left_padded(PROMPTS[:5], rows=[{"prompt": "q"}] * 5)])
    make_trainer().validate(module, columns, verbose=False)
    assert [len(texts) for texts, _ in module.reward.seen[9:]] == [5, 10]  # what the reward reads is another


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_reference_of_an_adapter_is_the_policy_without_it(make_folder, validate, kind):
    peft = pytest.importorskip("peft")
    folder = make_folder(kind, end=ENDS)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"])
    modules = []
    for policy, options in (
        (ModelSource(path=folder, peft=config), {}),
        (ModelSource(path=folder), {"reference": ModelSource(path=folder)}),
    ):
        module = PPOModule(
            policy, Kept(), **gathered(generation=SamplingParams(max_new_tokens=6), evaluations=ALL, **options)
        )
        module.configure_model()
        modules.append(leave(module))
    found = [validate(module, texts=True) for module in modules]
    theirs = [[game[2] for game in played(module.reward, 2)] for module in modules]
    assert theirs[0] == theirs[1]
    assert found[0]["best_of_2/reward"] == found[1]["best_of_2/reward"]
    assert found[0]["ptx_loss_reference"] == pytest.approx(found[1]["ptx_loss_reference"], rel=1e-6)
    ours = [[game[0] for game in played(module.reward, 2)] for module in modules]
    assert ours[0] != ours[1]  # one left by its adapter, one by its weights
    layers = [m for m in modules[0].policy.network.modules() if getattr(m, "disable_adapters", None) in (True, False)]
    assert layers  # a transformers model has a method of that name
    assert not any(layer.disable_adapters for layer in layers)  # the adapter is on again


def test_evaluations_do_not_disturb_training(make_ppo, make_trainer, as_loader, left_padded, right_padded):
    def run(evaluations, seed: int = 0):
        module = make_ppo(generation=SamplingParams(max_new_tokens=6, seed=seed), evaluations=evaluations)
        held_out = [as_loader([left_padded(PROMPTS[:3])]), as_loader([right_padded(TEXTS)])]
        trainer = make_trainer(val_check_interval=1, num_sanity_val_steps=1)
        trainer.fit(module, as_loader([{"prompts": left_padded(PROMPTS)}] * 3), held_out)
        return module, torch.cat([p.detach().flatten() for p in module.policy.parameters()])

    _, plain = run(())
    module, evaluated = run((*ALL, GoldReward(reward=Kept(factor=5))))
    assert torch.equal(evaluated, plain)
    assert not torch.equal(run((), seed=1)[1], plain)
    assert module.trainer.callback_metrics["eval/win_rate"] >= 0
    gold = module.evaluation.panel.current[-1]
    assert len(gold.best["gold"]) == 3
    assert module.evaluation.panel.given[-1].best is None


def test_own_evaluation_is_a_few_lines(make_ppo, validate):
    class Longest(Evaluator):
        name = "longest"

        def of_answers(self, answers):
            return {"tokens": answers.policy.lengths, "place": answers.scores, "pair": answers.reference_scores}

        def conclude(self, notes):
            return {"longest": float(notes["tokens"].max()), "rows": float(len(notes["place"]))}

    module = leave(make_ppo(evaluations=[Longest(), BestOfN(n=(2,))]))
    found = validate(module)
    assert found["longest"] == max(len(game[0]) for game in played(module.reward, 2))
    assert found["rows"] == 8


def test_names_must_differ(make_ppo):
    with pytest.raises(ValueError, match=r"\['win_rate'\] twice"):
        make_ppo(evaluations=[WinRate(), WinRate(samples=2)])


def test_evaluation_of_data_that_is_not_served_is_refused(make_ppo, validate, make_trainer, as_loader, right_padded):
    with pytest.raises(ValueError, match="AlignmentTax needs texts: set the data's `val_pretrain`"):
        validate(make_ppo(evaluations=[AlignmentTax()]))
    with pytest.raises(ValueError, match="BestOfN needs held-out prompts"):
        make_trainer().validate(make_ppo(evaluations=[BestOfN()]), as_loader([right_padded(TEXTS)]), verbose=False)


@pytest.mark.parametrize("n", [(), (0, 2)])
def test_best_of_n_needs_responses(n):
    with pytest.raises(ValueError, match="`n`"):
        BestOfN(n=n)


def test_test_logs_under_its_own_name(make_ppo, make_trainer, as_loader, left_padded):
    module = make_ppo(evaluations=[WinRate()])
    (found,) = make_trainer().test(module, as_loader([left_padded(PROMPTS)]), verbose=False)
    assert {"test/win_rate", "test/win_rate_length_controlled", "test/reward"} <= found.keys()
