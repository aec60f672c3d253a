"""Who scores: functions, modules, learned reward models."""

from __future__ import annotations

import copy
import dataclasses
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lightning_rlhf.core import ConstantSchedule
from lightning_rlhf.data import ComparisonDataModule
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.models import ModelSource, ScalarModel
from lightning_rlhf.modules import PPOModule, RewardModule
from lightning_rlhf.rewards import FunctionReward, LearnedReward, ModuleReward, TextReward, as_reward
from lightning_rlhf.rewards.errors import RewardError, scored_or_told
from lightning_rlhf.types import Rollout

A = 10


@pytest.fixture
def text_rollout():
    """Prompts `a b` and `c`; responses `d e </s>`, cut short `f`, and `</s>` alone."""
    tokens = torch.tensor([[10, 11, 13, 14, 0], [0, 12, 15, 0, 0], [0, 12, 0, 31, 31]])
    attention = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0]]).bool()
    response = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 0]]).bool()
    zeros = torch.zeros(3, 3)
    return Rollout(
        tokens=tokens,
        attention_mask=attention,
        response_mask=response,
        ended=torch.tensor([True, False, True]),
        prompt_index=torch.arange(3),
        logprobs=zeros,
        sampler_logprobs=zeros,
        ref_logprobs=zeros,
        entropy=zeros,
        values=zeros,
    )


ROWS = [{"prompt": "a b", "topic": "x"}, {"prompt": "c", "topic": "y", "weight": 2}, {"prompt": "c", "topic": "z"}]


def prepared(reward, tokenizer):
    reward = as_reward(reward)
    reward.prepare(tokenizer)
    return reward


@pytest.mark.parametrize("score", [1e300, -1e39])
def test_score_must_be_finite_where_it_is_used(score, text_rollout, toy_tokenizer, tmp_path, monkeypatch):
    """In float32, as the log-probabilities are; in float64 it is let in."""
    monkeypatch.chdir(tmp_path)
    reward = prepared(lambda prompts, responses: torch.tensor([0.0, score, 0.0], dtype=torch.float64), toy_tokenizer)
    asked = {"rows": ROWS, "agreed": lambda fine: fine, "iteration": 3, "run": tmp_path}
    said = re.escape(f"{score} for response 1: return numbers that are finite in float32")
    with pytest.raises(RewardError, match=said):
        scored_or_told(reward, text_rollout, **asked)
    wide = dataclasses.replace(text_rollout, logprobs=text_rollout.logprobs.double())
    assert scored_or_told(reward, wide, **asked).total.tolist() == [0.0, score, 0.0]


# Functions


def test_function_gets_text_and_the_columns_it_names(text_rollout, toy_tokenizer):
    seen = []

    def score(prompts, responses, topic):
        seen.append((prompts, responses, topic))
        return [1, 2.5, -3]

    found = prepared(score, toy_tokenizer)(text_rollout, ROWS)
    assert found.tolist() == [1.0, 2.5, -3.0]
    assert found.dtype == torch.float32
    assert seen == [(["a b", "c", "c"], ["d e", "f", ""], ["x", "y", "z"])]


def test_function_with_kwargs_gets_every_column(text_rollout, toy_tokenizer):
    seen = []

    def score(prompts, responses, **columns):
        seen.append(columns)
        return torch.zeros(3)

    prepared(score, toy_tokenizer)(text_rollout, ROWS)
    assert seen == [{"topic": ["x", "y", "z"], "weight": [None, 2, None]}]


def test_function_may_name_its_first_arguments_as_it_likes(text_rollout, toy_tokenizer):
    found = prepared(lambda questions, answers: [len(a) for a in answers], toy_tokenizer)(text_rollout, ROWS)
    assert found.tolist() == [3.0, 1.0, 0.0]


@pytest.mark.parametrize("takes_all", [True, False])
@pytest.mark.parametrize("column", ["responses", "prompts"])
def test_column_named_like_an_argument_does_not_break_the_call(text_rollout, toy_tokenizer, takes_all, column):
    """Preference files have a column `responses`; the function's own argument is the policy's response."""

    def named(prompts, responses):
        return [len(r) for r in responses]

    def everything(prompts, responses, **columns):
        return [len(r) for r in responses]

    rows = [row | {column: ["one", "two"]} for row in ROWS]
    found = prepared(everything if takes_all else named, toy_tokenizer)(text_rollout, rows)
    assert found.tolist() == [3.0, 1.0, 0.0]


def test_function_gets_messages_as_they_stand_in_the_data(text_rollout, toy_tokenizer):
    dialogue = [{"role": "user", "content": "a b"}]
    seen = []
    rows = [{"prompt": dialogue}] * 3
    prepared(lambda prompts, responses: seen.extend(prompts) or [0.0] * 3, toy_tokenizer)(text_rollout, rows)
    assert seen == [dialogue] * 3


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (np.array([1.0, 2.0, 3.0]), [1.0, 2.0, 3.0]),
        (torch.tensor([1, 2, 3]), [1.0, 2.0, 3.0]),
        ([True, False, True], [1.0, 0.0, 1.0]),
        ([torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)], [1.0, 2.0, 3.0]),
        ((np.float32(1), np.float64(2), 3), [1.0, 2.0, 3.0]),
    ],
    ids=["numpy", "integers", "booleans", "scalars", "mixed"],
)
def test_scores_may_be_any_numbers(text_rollout, toy_tokenizer, scores, expected):
    found = prepared(lambda prompts, responses: scores, toy_tokenizer)(text_rollout, ROWS)
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("scores", "error", "words"),
    [
        ([1.0, 2.0], ValueError, "for 3"),
        (torch.zeros(3, 1), ValueError, r"\(3, 1\)"),
        (1.0, ValueError, "one number per response"),
        ([1.0, float("nan"), 2.0], ValueError, "nan for response 1"),
        ([1.0, 0.0, float("-inf")], ValueError, "-inf for response 2"),
        (None, TypeError, "NoneType"),
        (["good", "bad", "ugly"], TypeError, "3 numbers"),
    ],
    ids=["count", "shape", "scalar", "nan", "infinite", "none", "text"],
)
def test_wrong_scores_are_refused_by_name(text_rollout, toy_tokenizer, scores, error, words):
    def my_judge(prompts, responses):
        return scores

    with pytest.raises(error, match=words) as raised:
        prepared(my_judge, toy_tokenizer)(text_rollout, ROWS)
    assert "my_judge" in str(raised.value)


def test_text_without_a_tokenizer_is_refused(text_rollout):
    with pytest.raises(ValueError, match="tokenizer"):
        prepared(lambda prompts, responses: [0.0] * 3, None)(text_rollout, ROWS)


def test_what_is_no_reward_is_refused():
    with pytest.raises(TypeError, match="int"):
        as_reward(3)


def test_partial_function_is_a_reward(text_rollout, toy_tokenizer):
    def score(prompts, responses, scale=1.0):
        return [scale * len(r) for r in responses]

    assert prepared(partial(score, scale=2.0), toy_tokenizer)(text_rollout, ROWS).tolist() == [6.0, 2.0, 0.0]


def test_subclass_of_text_reward_scores(text_rollout, toy_tokenizer):
    class Longest(TextReward):
        def score(self, prompts, responses, **columns):
            return [len(p) - len(r) for p, r in zip(prompts, responses, strict=True)]

    assert prepared(Longest(), toy_tokenizer)(text_rollout, ROWS).tolist() == [0.0, 0.0, 1.0]


# Modules


class Counter(nn.Module):
    def forward(self, tokens, mask):
        return mask.sum(1).float()


def test_module_scores_token_ids(text_rollout):
    reward = as_reward(Counter())
    assert isinstance(reward, ModuleReward)
    assert reward(text_rollout, ROWS).tolist() == [5.0, 2.0, 2.0]


def test_module_of_another_shape_is_refused(text_rollout):
    class PerToken(nn.Module):
        def forward(self, tokens, mask):
            return tokens.float()

    with pytest.raises(ValueError, match="PerToken.*one number per response"):
        as_reward(PerToken())(text_rollout, ROWS)


def test_reward_module_scores_as_its_forward_says(text_rollout, make_scorer):
    module = RewardModule(make_scorer())
    module.configure_model()
    module.model.bias = 2.0
    found = as_reward(module)(text_rollout, ROWS)
    for i, row in enumerate(([10, 11, 13, 14, 0], [12, 15], [12, 0])):
        backbone = module.model.network.transformer(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
        assert float(found[i]) == pytest.approx(float(module.model.network.score(backbone)) + 2.0, abs=1e-5)


def test_reward_module_that_was_never_configured_scores(text_rollout, make_scorer):
    """Given to PPOModule as it is, without a trainer having built it."""
    assert prepared(RewardModule(make_scorer()), None)(text_rollout, ROWS).shape == (3,)


# Learned rewards


def direct_score(folder: str, row: list[int]) -> float:
    """The head on the last hidden state of an unpadded row, plus the bias in the config."""
    model = ScalarModel.load(ModelSource(path=folder), new_head=True)
    bare = model.network.eval()
    hidden = getattr(bare, bare.base_model_prefix)(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
    return float(bare.score(hidden)) + float(getattr(bare.config, "demonstration_bias", 0.0))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_learned_reward_scores_the_policys_tokens(text_rollout, make_folder, toy_tokenizer, kind):
    folder = make_folder(kind, scorer=True, demonstration_bias=1.5)
    reward = prepared(LearnedReward(folder), toy_tokenizer)
    assert reward.shares_vocabulary
    found = reward(text_rollout, ROWS)
    expected = [direct_score(folder, row) for row in ([10, 11, 13, 14, 0], [12, 15], [12, 0])]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in expected}) == 3


def test_learned_reward_reads_text_in_its_own_tokens(text_rollout, make_folder, toy_tokenizer, other_tokenizer):
    folder = make_folder(scorer=True, tokenizer=other_tokenizer)
    reward = prepared(LearnedReward(folder), toy_tokenizer)
    assert not reward.shares_vocabulary
    mirrored = [[35, 34, 32, 31, 0], [33, 30], [33, 0]]  # a is 35; the response that did not end has no end token
    expected = [direct_score(folder, row) for row in mirrored]
    assert reward(text_rollout, ROWS).tolist() == pytest.approx(expected, abs=1e-5)
    same = prepared(LearnedReward(folder), other_tokenizer)(text_rollout, ROWS).tolist()
    assert same != pytest.approx(expected, abs=1e-3)


def test_learned_reward_scores_text(make_folder, toy_tokenizer):
    folder = make_folder(scorer=True)
    found = prepared(LearnedReward(folder), toy_tokenizer).score(["a b", "c"], ["d e", ""])
    assert found.tolist() == pytest.approx([direct_score(folder, [10, 11, 13, 14, 0]), direct_score(folder, [12, 0])])


def test_learned_reward_templates_text_prompts_on_request(text_rollout, make_folder, toy_tokenizer, other_tokenizer):
    folder = make_folder(scorer=True, tokenizer=other_tokenizer)
    reward = prepared(LearnedReward(folder, prompt_role="user"), toy_tokenizer)
    tokens, mask = reward.encode(text_rollout, ROWS)
    # <|im_start|> user a b <|im_end|> <|im_start|> assistant d e <|im_end|>, as the template ends a turn
    assert tokens[0][mask[0]].tolist() == [3, 5, 35, 34, 4, 3, 6, 32, 31, 4]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_learned_reward_has_its_dtype(make_folder, toy_tokenizer, dtype):
    reward = prepared(LearnedReward(make_folder(scorer=True), dtype=dtype), toy_tokenizer)
    assert {p.dtype for p in reward.networks()[0].parameters()} == {getattr(torch, dtype)}


@pytest.fixture
def comparisons(write_rows):
    rows = [{"prompt": p, "chosen": "d e", "rejected": "f"} for p in ("a b", "c", "b")]
    return write_rows("comparisons.jsonl", rows)


@pytest.fixture
def checkpoint(make_folder, make_trainer, comparisons, tmp_path):
    """A checkpoint of a RewardModule trained in Python on a ModelSource, and the module."""
    module = RewardModule(ModelSource(path=make_folder(scorer=True)), schedule=ConstantSchedule())
    trainer = make_trainer(precision="32-true")
    trainer.fit(module, ComparisonDataModule(train=comparisons, batch_size=3))
    module.model.bias = 0.25
    trainer.save_checkpoint(tmp_path / "reward.ckpt")
    return str(tmp_path / "reward.ckpt"), module


def test_learned_reward_from_a_checkpoint_of_the_trainer(text_rollout, checkpoint, toy_tokenizer):
    path, module = checkpoint
    found = prepared(LearnedReward(path), toy_tokenizer)(text_rollout, ROWS)
    with torch.no_grad():
        expected = module(text_rollout.tokens, text_rollout.attention_mask)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.fixture
def cli_checkpoint(make_folder, comparisons, tmp_path):
    """A checkpoint as `lightning-rlhf fit` leaves it."""
    from lightning_rlhf.cli import main

    folder = make_folder(scorer=True)
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    cli = main(
        [
            "fit",
            "--model=RewardModule",
            f"--model.model={{path: {folder}}}",
            "--data=ComparisonDataModule",
            f"--data.train={comparisons}",
            f"--data.val={comparisons}",
            "--data.batch_size=3",
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=1",
            "--trainer.enable_checkpointing=false",
            f"--trainer.default_root_dir={tmp_path}",
            *quiet,
        ]
    )
    cli.model.model.bias = 0.25
    cli.trainer.save_checkpoint(tmp_path / "cli.ckpt")
    return str(tmp_path / "cli.ckpt"), cli.model


def test_learned_reward_from_a_checkpoint_of_the_command_line(text_rollout, cli_checkpoint, toy_tokenizer):
    path, module = cli_checkpoint
    reward = prepared(LearnedReward(path), toy_tokenizer)
    with torch.no_grad():
        expected = module(text_rollout.tokens, text_rollout.attention_mask)
    assert torch.allclose(reward(text_rollout, ROWS), expected, atol=1e-6)
    assert reward.model.bias == 0.25


def test_learned_reward_from_a_checkpoint_has_its_dtype(cli_checkpoint, toy_tokenizer):
    reward = prepared(LearnedReward(cli_checkpoint[0], dtype="bfloat16"), toy_tokenizer)
    assert {p.dtype for p in reward.networks()[0].parameters()} == {torch.bfloat16}


def test_checkpoint_of_another_module_is_refused(make_lm, make_trainer, as_loader, left_padded, tmp_path):
    module = PPOModule(make_lm(), Counter(), generation=SamplingParams(max_new_tokens=2))
    trainer = make_trainer()
    trainer.fit(module, as_loader([{"prompts": left_padded([[12]])}]))
    trainer.save_checkpoint(tmp_path / "ppo.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of a RewardModule"):
        LearnedReward(str(tmp_path / "ppo.ckpt")).prepare(None)


# In the module


def test_frozen_networks_stay_out_of_the_state_and_follow_the_module(make_lm, make_folder, toy_tokenizer):
    module = PPOModule(make_lm(), LearnedReward(make_folder(scorer=True)), tokenizer=toy_tokenizer)
    module.configure_model()
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy"}
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"policy"}
    frozen = [module.reward.model, module.collector.reference.frozen]
    for cast in (torch.float64, torch.bfloat16, torch.float32):
        module.to(cast)
        assert {p.dtype for network in frozen for p in network.parameters()} == {cast}
    module.to("meta")
    assert {p.device.type for network in frozen for p in network.parameters()} == {"meta"}


def test_frozen_networks_do_not_train(make_lm, make_folder, toy_tokenizer, make_trainer, as_loader, left_padded):
    module = PPOModule(
        make_lm(),
        LearnedReward(make_folder(scorer=True)),
        tokenizer=toy_tokenizer,
        generation=SamplingParams(max_new_tokens=3),
        schedule=ConstantSchedule(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    module.configure_model()
    module.double()
    frozen = [copy.deepcopy(module.reward.model), copy.deepcopy(module.collector.reference.frozen)]
    before = copy.deepcopy(module.policy)
    batch = {"prompts": left_padded([[12, 13], [10]], rows=ROWS[:2])}
    make_trainer().fit(module, as_loader([batch] * 2))
    for old, new in zip(frozen, [module.reward.model, module.collector.reference.frozen], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
        assert not new.training
    assert not all(torch.equal(a, b) for a, b in zip(before.parameters(), module.policy.parameters(), strict=True))


def test_function_reward_is_made_of_a_function():
    assert isinstance(as_reward(lambda prompts, responses: []), FunctionReward)


@pytest.mark.parametrize(
    "fn",
    [
        lambda questions, answers: [float(len(answer)) for answer in answers],
        lambda questions, answers, **columns: [float("answers" not in columns) * len(answer) for answer in answers],
    ],
)
def test_first_two_arguments_are_texts_whatever_they_are_called(text_rollout, toy_tokenizer, fn):
    """A column of the same name is left out, and not given twice."""
    found = prepared(fn, toy_tokenizer)(text_rollout, [row | {"answers": "no response"} for row in ROWS])
    assert len(set(found.tolist())) > 1
    assert torch.equal(
        found, prepared(lambda _, answers: [float(len(a)) for a in answers], toy_tokenizer)(text_rollout, ROWS)
    )
