"""Rewards at their edges: what text a function sees, whose tokens a reward model reads, which checkpoints it takes."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from gathered import gathered
from transformers import AutoModelForSequenceClassification

from lightning_rlhf.cli import main
from lightning_rlhf.core import ConstantSchedule
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import PPOModule, SFTModule
from lightning_rlhf.rewards import LearnedReward, Reward, as_reward
from lightning_rlhf.text import Encoder

PROMPTS = [[10, 11], [12]]
RESPONSES = [[13, 14, 0], [15]]
ROWS = [{"prompt": "a b"}, {"prompt": "c"}]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    """Lightning warns of arguments given twice, and takes pytest's for its own."""
    monkeypatch.setattr("sys.argv", ["test"])


def prepared(reward, tokenizer) -> Reward:
    reward = as_reward(reward)
    reward.prepare(tokenizer)
    return reward


def hugging_face_score(network, row: list[int]) -> float:
    """Head on the last hidden state of the row alone, unpadded."""
    with torch.no_grad():
        hidden = network.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
        return float(hidden @ network.score.weight[0])


# What a function sees


def test_special_tokens_are_left_out_of_responses(make_rollout, toy_tokenizer):
    seen = []
    rollout = make_rollout(PROMPTS, [[13, 4, 14, 0], [3, 15]], fill=25)  # 3 and 4 open and close a message
    prepared(lambda prompts, responses: seen.extend(responses) or [0.0, 0.0], toy_tokenizer)(rollout, ROWS)
    assert seen == ["d e", "f"]


@pytest.mark.parametrize("special", [True, False])
def test_tags_stay_in_responses(make_rollout, toy_tokenizer, special):
    """A reward of format has to see <think> … </think>, also where they are special tokens."""
    toy_tokenizer.add_tokens(["<think>", "</think>", "<alone>"], special_tokens=special)
    opening, closing, alone = toy_tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<alone>"])
    seen = []
    rollout = make_rollout(PROMPTS, [[opening, 13, closing, 4, 14, 0], [1, 15, alone]])  # 1 and 0 are <s> and </s>
    prepared(lambda prompts, responses: seen.extend(responses) or [0.0, 0.0], toy_tokenizer)(rollout, ROWS)
    assert seen == ["<think> d </think> e", "f" if special else "f <alone>"]


def test_function_may_have_columns_of_its_own(make_rollout, toy_tokenizer):
    def score(prompts, responses, *, weight, missing="none"):
        assert missing == "none"
        return weight

    rows = [row | {"weight": float(i), "other": 7} for i, row in enumerate(ROWS)]
    found = prepared(score, toy_tokenizer)(make_rollout(PROMPTS, RESPONSES), rows)
    assert found.tolist() == [0.0, 1.0]


def test_scores_in_double_precision_stay_so(make_rollout, toy_tokenizer):
    third = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    found = prepared(lambda prompts, responses: third, toy_tokenizer)(make_rollout(PROMPTS, RESPONSES), ROWS)
    assert torch.equal(found, third)


def test_gpt2_sequence_classification_network_is_a_reward(make_rollout, make_scorer):
    network = make_scorer("gpt2", end=99, pad_token_id=35).eval()  # padding that no row uses
    found = as_reward(network)(make_rollout([[10, 11], [12, 16]], [[13], [15]]), ROWS)
    assert found.tolist() == pytest.approx(
        [hugging_face_score(network, [10, 11, 13]), hugging_face_score(network, [12, 16, 15])]
    )


# Whose tokens a reward model reads


def test_bias_is_added_once(make_rollout, make_folder, toy_tokenizer):
    rollout = make_rollout(PROMPTS, RESPONSES)
    plain, shifted = (
        prepared(LearnedReward(make_folder(scorer=True, demonstration_bias=bias)), toy_tokenizer)(rollout, ROWS)
        for bias in (0.0, 1.5)
    )
    assert torch.allclose(shifted - plain, torch.tensor(1.5), atol=1e-6)


def test_messages_go_through_the_template_of_the_reward_model(
    make_rollout, make_folder, toy_tokenizer, other_tokenizer
):
    folder = make_folder(scorer=True, tokenizer=other_tokenizer, demonstration_bias=-0.5)
    rows = [{"prompt": [{"role": "user", "content": "a b"}]}, {"prompt": [{"role": "system", "content": "c"}]}]
    reward = prepared(LearnedReward(folder), toy_tokenizer)
    rollout = make_rollout([[3, 5, 10, 11, 4, 3, 6], [3, 7, 12, 4, 3, 6]], RESPONSES)
    tokens, mask = reward.encode(rollout, rows)
    by_hand = [[3, 5, 35, 34, 4, 3, 6, 32, 31, 4], [3, 7, 33, 4, 3, 6, 30]]  # a is 35; the second was cut short
    assert [row[real].tolist() for row, real in zip(tokens, mask, strict=True)] == by_hand
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = [hugging_face_score(network, row) - 0.5 for row in by_hand]
    assert reward(rollout, rows).tolist() == pytest.approx(expected, abs=1e-5)


def test_same_vocabulary_reads_the_tokens_and_not_the_text(make_rollout, make_folder, toy_tokenizer):
    """Token 9 is no word: only by its id can it tell."""
    folder = make_folder(scorer=True)
    reward = prepared(LearnedReward(folder), toy_tokenizer)
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = reward(make_rollout(PROMPTS, [[9, 14], [8]]), ROWS)
    expected = [hugging_face_score(network, row) for row in ([10, 11, 9, 14], [12, 8])]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


DIALOGUE = [{"role": "user", "content": "a b"}]
RENDERED = [3, 5, 10, 11, 4, 3, 6]
"""<|im_start|> user a b <|im_end|> <|im_start|> assistant"""


@pytest.mark.parametrize("ended_by", [0, 4])
def test_ended_response_is_read_at_the_end_that_comparisons_taught(make_rollout, make_folder, toy_tokenizer, ended_by):
    """The template's <|im_end|> (4) after a dialogue, the tokenizer's </s> (0) after a text, whichever was sampled."""
    folder = make_folder(scorer=True)
    rows = [{"prompt": DIALOGUE}, *({"prompt": text} for text in ("a b", "a b", "", "a b"))]
    empty = [3, 5, 4, 3, 6]
    prompts = [RENDERED, [10, 11], RENDERED, empty, [10, 11]]  # the third and fourth by `prompt_role` of the data
    rollout = make_rollout(prompts, [[13, ended_by]] * 4 + [[13, 14, 15]], fill=25)
    rollout.ended[:] = torch.tensor([True, True, True, True, False])
    before = rollout.tokens.clone()
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    taught = [[*RENDERED, 13, 4], [10, 11, 13, 0], [*RENDERED, 13, 4], [*empty, 13, 4], [10, 11, 13, 14, 15]]
    expected = [hugging_face_score(network, row) for row in taught]
    found = prepared(LearnedReward(folder), toy_tokenizer)(rollout, rows)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(rollout.tokens, before)
    comparisons = Encoder(toy_tokenizer)
    assert [list(comparisons.prompt(r["prompt"])) + list(comparisons.response("d", r["prompt"])) for r in rows[:2]] == (
        taught[:2]
    )


def test_response_is_read_as_it_ended_where_all_agree(make_rollout, make_folder, toy_tokenizer):
    toy_tokenizer.eos_token = "<|im_end|>"
    folder = make_folder(scorer=True, tokenizer=toy_tokenizer)
    rollout = make_rollout([RENDERED, [10, 11]], [[13, 4], [13, 4]])
    rollout.ended[:] = True
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = [hugging_face_score(network, row) for row in ([*RENDERED, 13, 4], [10, 11, 13, 4])]
    found = prepared(LearnedReward(folder), toy_tokenizer)(rollout, [{"prompt": DIALOGUE}, {"prompt": "a b"}])
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


# Checkpoints


@pytest.fixture
def fit(tmp_path, make_folder, write_rows):
    """A run of the command line on a folder; the CLI object and the checkpoint it left."""
    answers = [{"prompt": p, "response": "d e"} for p in "abcd"]
    pairs = [{"prompt": p, "chosen": "d e", "rejected": "f"} for p in "abcd"]
    demonstrations, comparisons = write_rows("d.jsonl", answers), write_rows("c.jsonl", pairs)

    def run(stage: str, **options):
        arguments = [f"--trainer.{name}=false" for name in ("logger", "enable_progress_bar", "enable_model_summary")]
        arguments += ["--trainer.accelerator=cpu", "--trainer.max_steps=2", f"--trainer.default_root_dir={tmp_path}"]
        arguments += [f"--model={stage}", f"--model.model.path={make_folder(**options)}", "--data.batch_size=2"]
        arguments += ["--model.optimizer=SGD", "--model.optimizer.lr=0.5", "--model.schedule=ConstantSchedule"]
        if stage == "RewardModule":
            arguments += ["--data=ComparisonDataModule", f"--data.train={comparisons}", f"--data.val={comparisons}"]
            arguments += [f"--data.demonstrations={demonstrations}"]
        else:
            arguments += ["--data=DemonstrationDataModule", f"--data.train={demonstrations}"]
        cli = main(["fit", *sorted(arguments, key=lambda a: "=" in a and a.count("."))])
        return cli, str(tmp_path / "checkpoints/last.ckpt")

    return run


@pytest.mark.parametrize("scorer", [True, False], ids=["reward folder", "language model"])
def test_checkpoint_of_the_command_line_scores_as_its_model(fit, make_rollout, toy_tokenizer, scorer):
    cli, path = fit("RewardModule", scorer=scorer)
    reward = prepared(LearnedReward(path), toy_tokenizer)
    network, bias = cli.model.model.network.eval(), cli.model.model.bias
    # The bias was found in validation: the demonstrations score 0 on average.
    demonstrations = [hugging_face_score(network, [p, 13, 14, 0]) for p in (10, 11, 12, 13)]
    assert bias == pytest.approx(-sum(demonstrations) / 4, abs=1e-5)
    assert abs(bias) > 1e-3
    expected = [hugging_face_score(network, row) + bias for row in ([10, 11, 13, 14, 0], [12, 15])]
    assert reward(make_rollout(PROMPTS, RESPONSES), ROWS).tolist() == pytest.approx(expected, abs=1e-5)
    start = AutoModelForSequenceClassification.from_pretrained(cli.config.fit.model.init_args.model.path, num_labels=1)
    assert not torch.allclose(start.base_model.wte.weight, network.base_model.wte.weight, atol=1e-4)  # it trained


def test_sft_checkpoint_is_refused_clearly(fit, toy_tokenizer):
    _, path = fit("SFTModule")
    with pytest.raises(ValueError, match="no checkpoint of a RewardModule"):
        LearnedReward(path).prepare(toy_tokenizer)


def test_file_of_bare_weights_is_refused_clearly(make_scorer, tmp_path, toy_tokenizer):
    torch.save(make_scorer().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="no checkpoint of a RewardModule"):
        LearnedReward(str(tmp_path / "weights.pt")).prepare(toy_tokenizer)


def test_file_that_is_no_checkpoint_is_refused_clearly(write_rows, toy_tokenizer):
    with pytest.raises(ValueError, match="no checkpoint of a RewardModule"):
        LearnedReward(write_rows("rows.jsonl", ROWS)).prepare(toy_tokenizer)


def test_checkpoint_of_a_built_module_says_what_to_do(make_lm, make_trainer, as_loader, right_padded, tmp_path):
    trainer = make_trainer()
    trainer.fit(SFTModule(make_lm()), as_loader([right_padded([[10, 11, 12]])]))
    trainer.save_checkpoint(tmp_path / "sft.ckpt")
    with pytest.raises(ValueError, match="save_pretrained"):
        LearnedReward(str(tmp_path / "sft.ckpt")).prepare(None)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        LearnedReward(str(tmp_path / "nothing")).prepare(None)


def test_language_model_is_no_learned_reward(make_folder, toy_tokenizer):
    with pytest.raises(ValueError, match="no trained scalar head"):
        LearnedReward(make_folder(scorer=False)).prepare(toy_tokenizer)


# Frozen networks


@pytest.mark.parametrize("kind", ["module", "folder"])
def test_frozen_networks_stay_out_of_checkpoints(
    kind, make_lm, make_scorer, make_folder, toy_tokenizer, make_trainer, as_loader, left_padded, tmp_path
):
    reward = make_scorer("llama") if kind == "module" else LearnedReward(make_folder(scorer=True))
    options = {
        "generation": SamplingParams(max_new_tokens=3),
        "schedule": ConstantSchedule(),
        "tokenizer": toy_tokenizer,
    }
    module = PPOModule(make_lm(), reward, **gathered(optimizer=partial(torch.optim.SGD, lr=0.1), **options))
    trainer = make_trainer()
    trainer.fit(module, as_loader([{"prompts": left_padded(PROMPTS, rows=ROWS)}]))
    trainer.save_checkpoint(tmp_path / "ppo.ckpt")
    names = torch.load(tmp_path / "ppo.ckpt", weights_only=True)["state_dict"].keys()
    assert set(names) == {f"policy.{name}" for name in module.policy.state_dict()}
    (network,) = module.reward.networks()
    frozen = {id(p) for part in (network, module.collector.reference.frozen) for p in part.parameters()}
    assert frozen
    assert not frozen & {id(p) for p in module.parameters()}
    assert {p.dtype for part in (network, module.collector.reference.frozen) for p in part.parameters()} == {
        torch.float64
    }
    assert not any(p.requires_grad for part in (network, module.collector.reference.frozen) for p in part.parameters())


def test_value_network_from_the_reward_is_a_copy(make_folder, toy_tokenizer):
    reward = prepared(LearnedReward(make_folder(scorer=True, demonstration_bias=0.7)), toy_tokenizer)
    value = reward.load()
    assert value.bias == 0.7
    assert all(p.requires_grad for p in value.parameters())
    assert not {p.data_ptr() for p in value.parameters()} & {p.data_ptr() for p in reward.model.parameters()}
    assert (
        ModelSource(path=reward.path).scorer(new_head=False).score.weight.tolist()
        == value.network.score.weight.tolist()
    )


@pytest.mark.parametrize("foreign", [False, True])
def test_batches_of_similar_length_change_no_score(make_rollout, make_folder, toy_tokenizer, other_tokenizer, foreign):
    prompts = [[10, 11], [12], [13, 14, 15, 16], [17], [18, 19, 20]]
    responses = [[13, 14, 0], [15], [16, 17, 18, 19, 20, 0], [21, 0], [22, 23]]
    rows = [{"prompt": "a b"}] * 5
    rollout = make_rollout(prompts, responses, fill=25)
    folder = make_folder("llama", scorer=True, tokenizer=other_tokenizer if foreign else None)
    found, passes = [], []
    for limit in (1000, 12, 1):
        reward = prepared(LearnedReward(folder, batch_tokens=limit), toy_tokenizer)
        reward.model.register_forward_pre_hook(lambda _, inputs: passes.append(tuple(inputs[0].shape)))
        found.append(reward(rollout, rows))
        passes.append(None)
    whole, some, alone = found
    assert torch.allclose(some, whole, rtol=0, atol=1e-6)
    assert torch.allclose(alone, whole, rtol=0, atol=1e-6)
    assert len(set(whole.tolist())) == 5
    runs = [list(group) for real, group in itertools.groupby(passes, key=bool) if real]
    assert [len(run) for run in runs][::2] == [1, 5]
    assert 1 < len(runs[1]) < 5
    assert all(rows == 1 or rows * columns <= 12 for rows, columns in runs[1])


def test_batch_tokens_must_be_positive():
    with pytest.raises(ValueError, match="batch_tokens"):
        LearnedReward("nowhere", batch_tokens=0)
