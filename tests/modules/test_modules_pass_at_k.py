"""pass@k, majority@k and named validation sets through PPOModule."""

from __future__ import annotations

import json
from functools import partial
from math import comb

import pytest
import torch

from lightning_rlhf import BestOfN, PPOModule, PromptDataModule, SamplingParams
from lightning_rlhf.callbacks import RunCheckpoint, SampleLog
from lightning_rlhf.core import ConstantSchedule
from lightning_rlhf.evaluation import AlignmentTax, MajorityAtK, PassAtK
from lightning_rlhf.rewards import Reward, TextReward

ENDS = [0, 1]
EASY = ["a b", "c", "d e f"]
HARD = ["g", "h i", "j k l m", "n"]


class FirstIsLow(Reward):
    """1 where the first token is one of the first ones."""

    def __init__(self) -> None:
        self._seen: list[tuple[list[str], torch.Tensor]] = []

    def __call__(self, rollout, rows):
        first = rollout.tokens[:, rollout.prompt_width]
        scores = (first < 14).double()
        self._seen.append(([row["prompt"] for row in rows], scores))
        return scores


@pytest.fixture
def make_module(make_lm, make_tokenizer):
    def make(evaluations, reward=None, **options):
        return PPOModule(
            policy=make_lm(end=ENDS).double(),
            reward=reward or FirstIsLow(),
            generation=SamplingParams(max_new_tokens=4),
            tokenizer=make_tokenizer(),
            evaluations=evaluations,
            optimizer=partial(torch.optim.SGD, lr=0.01),
            schedule=ConstantSchedule(),
            **options,
        )

    return make


def rows(prompts):
    return [{"prompt": prompt} for prompt in prompts]


def validated(make_trainer, module, **sources) -> dict[str, float]:
    data = PromptDataModule(eval_batch_size=2, **sources)
    trainer = make_trainer()
    found = trainer.validate(module, data, verbose=False)
    return {name: value for part in found for name, value in part.items()}


def test_pass_at_k_is_the_unbiased_estimate(make_module, make_trainer):
    module = make_module([PassAtK(k=(1, 2, 4), samples=6)])
    found = validated(make_trainer, module, val=rows(EASY))
    drawn: dict[str, list[float]] = {}
    for prompts, scores in module.reward._seen:
        if len(prompts) > 2 or len(set(prompts)) < len(prompts):
            for prompt, score in zip(prompts, scores.tolist(), strict=True):
                drawn.setdefault(prompt, []).append(score)
    solved = {prompt: int(sum(scores[:6])) for prompt, scores in drawn.items()}
    assert set(solved) == set(EASY)
    assert 0 < sum(solved.values()) < 18
    for k in (1, 2, 4):
        expected = sum(1 - comb(6 - c, k) / comb(6, k) for c in solved.values()) / len(solved)
        assert found[f"eval/pass_at_{k}"] == pytest.approx(expected, abs=1e-6)
    assert found["eval/pass_at_1"] < found["eval/pass_at_2"] < found["eval/pass_at_4"]


class Says(TextReward):
    """1 for the answer `d`."""

    def score(self, prompts, responses, /, **columns):
        return [float("d" in response) for response in responses]


def test_majority_votes_by_the_answer(make_module, make_trainer):
    options = {"k": (1, 5), "samples": 8, "extract": r"([a-z])"}
    module = make_module([MajorityAtK(**options), PassAtK(k=(1,), samples=8)], reward=Says())
    found = validated(make_trainer, module, val=rows(EASY + HARD))
    assert 0 <= found["eval/majority_at_5"] <= 1
    assert found["eval/majority_at_1"] == pytest.approx(found["eval/pass_at_1"], abs=0.2)
    assert found["eval/majority_at_5"] != found["eval/majority_at_1"]


def test_answers_of_equal_value_are_one(make_module):
    from lightning_rlhf.evaluation.pass_at_k import _numbered

    assert _numbered(["2", "2.0", "1,000", "1000", None, " x", "x "]) == [0, 0, 1, 1, -1, 2, 2]


def test_evaluations_leave_each_other_alone(make_module, make_trainer):
    """The single response of `eval/reward` is the same whatever else is drawn."""
    alone = validated(make_trainer, make_module([]), val=rows(EASY))
    beside = validated(make_trainer, make_module([PassAtK(k=(3,)), BestOfN(n=(2,))]), val=rows(EASY))
    assert {name: beside[name] for name in alone} == alone


# Named sets


def test_each_set_is_measured_by_itself(make_module, make_trainer):
    evaluations = [PassAtK(k=(2,)), BestOfN(n=(2,))]
    both = validated(make_trainer, make_module(evaluations), val=rows(EASY), val_sets={"hard": rows(HARD)})
    easy = validated(make_trainer, make_module(evaluations), val=rows(EASY))
    assert {name: both[name] for name in easy} == easy
    of_hard = {name.removeprefix("eval@hard/") for name in both if name.startswith("eval@hard/")}
    assert of_hard == {name.removeprefix("eval/") for name in easy}
    alone = validated(make_trainer, make_module(evaluations), val_sets={"hard": rows(HARD)})
    assert not [name for name in alone if name.startswith("eval/")]
    assert {name: both[name] for name in alone} == alone
    assert both["eval@hard/response_length"] != both["eval/response_length"]


def test_evaluators_of_texts_are_of_the_first_set(make_module, make_trainer):
    texts = [{"text": "a b c d e f g h " * 3}]
    module = make_module([AlignmentTax()])
    options = {"val": rows(EASY), "val_pretrain": texts, "text_tokens": 8, "val_sets": {"hard": rows(HARD)}}
    found = validated(make_trainer, module, **options)
    assert "eval/alignment_tax" in found
    assert not [name for name in found if name.startswith("eval@hard/") and "tax" in name]


def test_best_checkpoint_by_a_named_set(make_module, make_trainer, tmp_path):
    module = make_module([PassAtK(k=(2,))])
    data = PromptDataModule(
        train=rows(EASY + HARD), val=rows(EASY), val_sets={"hard": rows(HARD)}, batch_size=4, eval_batch_size=2
    )
    checkpoint = RunCheckpoint(dirpath=str(tmp_path / "checkpoints"), monitor="eval@hard/pass_at_2")
    log = SampleLog(str(tmp_path))
    trainer = make_trainer(callbacks=[checkpoint, log], enable_checkpointing=True, max_epochs=2)
    trainer.fit(module, data)
    assert float(checkpoint.best_model_score) == pytest.approx(float(trainer.callback_metrics["eval@hard/pass_at_2"]))
    assert checkpoint.best_model_path
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in lines if line.get("set") == "hard"} == set(HARD)
    assert {line["prompt"] for line in lines if "set" not in line} == set(EASY)


@pytest.mark.parametrize("name", ["", "a/b", "a@b", "a b"])
def test_names_that_are_no_names_are_refused(name):
    with pytest.raises(ValueError, match="val_sets"):
        PromptDataModule(train=rows(EASY), val_sets={name: rows(HARD)})


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PassAtK(k=()), "`k`"),
        (lambda: PassAtK(k=(0,)), "`k`"),
        (lambda: PassAtK(k=(4,), samples=3), "`samples`"),
        (lambda: MajorityAtK(extract="no group"), "group"),
    ],
)
def test_impossible_evaluations_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
