"""One number per token: pooling by length, the head's start, the demonstration bias."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from lightning_rlhf.models import ModelSource, PolicyModel, ScalarModel, score_at_end

TEXTS = [[12, 13, 14, 0], [10, 0, 11], [20, 0], [33, 30, 29, 8, 7], [0, 0, 0]]  # 0 both ends and pads


def padded(texts, side, fill):
    width = max(map(len, texts)) + 1
    tokens, mask = [], []
    for text in texts:
        gap, real = [fill] * (width - len(text)), [True] * len(text)
        tokens.append(gap + text if side == "left" else text + gap)
        mask.append([False] * len(gap) + real if side == "left" else real + [False] * len(gap))
    return torch.tensor(tokens), torch.tensor(mask)


def by_hand(network, text) -> list[float]:
    """Head on the hidden states of the text alone."""
    with torch.no_grad():
        hidden = network.base_model(input_ids=torch.tensor([text])).last_hidden_state[0]
        return (hidden @ network.score.weight[0]).tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fill", [0, 25])
def test_score_is_of_the_last_token_by_length(make_scorer, kind, side, fill):
    model = ScalarModel(make_scorer(kind).double().eval())
    model.bias = 0.75
    tokens, mask = padded(TEXTS, side, fill)
    scores = model(tokens, mask)
    assert scores.shape == tokens.shape
    assert scores.dtype == torch.float64
    for i, text in enumerate(TEXTS):
        expected = [score + 0.75 for score in by_hand(model.network, text)]
        assert scores[i][mask[i]].tolist() == pytest.approx(expected, abs=1e-10)
    expected = [by_hand(model.network, text)[-1] + 0.75 for text in TEXTS]
    assert score_at_end(scores, mask).tolist() == pytest.approx(expected, abs=1e-10)


def test_pooling_by_the_padding_id_would_differ(make_scorer):
    """Negative control: transformers' own pooling takes the last token that is not the padding id."""
    model = ScalarModel(make_scorer().double().eval())
    tokens, mask = padded(TEXTS[:1], "right", 0)
    theirs = float(model.network(input_ids=tokens, attention_mask=mask.long()).logits)
    assert abs(theirs - by_hand(model.network, TEXTS[0])[-1]) > 1e-3
    assert theirs == pytest.approx(by_hand(model.network, TEXTS[0])[-2], abs=1e-10)


def test_score_at_end_takes_the_last_true_column():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0, 12.0]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]]).bool()
    assert score_at_end(scores, mask).tolist() == [2.0, 8.0, 10.0]


def test_low_precision_scores_are_float32(make_scorer):
    tokens, mask = padded(TEXTS, "right", 0)
    assert ScalarModel(make_scorer("llama").bfloat16())(tokens, mask).dtype == torch.float32


# The head


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_new_head_has_variance_one_over_width_plus_one(make_folder, kind):
    """1024 weights: the deviation is known to 2.2 %, so 9 % is four standard errors."""
    folder, width = make_folder(kind, width=256), 256
    torch.manual_seed(0)
    heads = torch.cat([ModelSource(path=folder).scorer(new_head=True).score.weight.flatten() for _ in range(4)])
    assert len(heads) == 4 * width
    assert float(heads.std()) == pytest.approx((width + 1) ** -0.5, rel=0.09)  # transformers would take 0.4
    assert abs(float(heads.mean())) < 4 * (width + 1) ** -0.5 / len(heads) ** 0.5


def test_trained_head_is_kept(make_folder):
    folder = make_folder(scorer=True)
    first, second = (ModelSource(path=folder).scorer(new_head=True) for _ in range(2))
    expected = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(first.score.weight, expected.score.weight)
    assert torch.equal(second.score.weight, expected.score.weight)
    backbone = first.base_model.state_dict()
    assert all(torch.equal(weight, backbone[name]) for name, weight in expected.base_model.state_dict().items())


def test_head_with_two_outputs_is_refused(make_scorer):
    network = make_scorer()
    network.score = nn.Linear(16, 2)
    with pytest.raises(ValueError, match="`score` has 2 outputs"):
        ScalarModel(network)


def test_network_without_a_head_is_refused(make_lm):
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no linear head"):
        ScalarModel(make_lm())


def test_encoder_is_scored_as_transformers_does_or_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    network = BertForSequenceClassification(BertConfig(vocab_size=36, num_labels=1, initializer_range=0.4, **sizes))
    network.eval()
    tokens, mask = torch.tensor([TEXTS[0]]), torch.ones(1, 4, dtype=torch.bool)
    try:
        found = score_at_end(ScalarModel(network)(tokens, mask), mask)
    except ValueError:
        return
    assert torch.allclose(found, network(tokens, attention_mask=mask.long()).logits[:, 0], atol=1e-5)


# The bias


def test_bias_travels_in_the_state(make_scorer):
    model, other = ScalarModel(make_scorer(seed=1)), ScalarModel(make_scorer(seed=2))
    model.bias = -1.25
    state = model.state_dict()
    assert state["_extra_state"] == {"demonstration_bias": -1.25}
    other.load_state_dict(state)
    assert other.bias == -1.25
    tokens, mask = padded(TEXTS, "left", 0)
    assert torch.equal(other.eval()(tokens, mask), model.eval()(tokens, mask))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_bias_travels_in_the_folder(make_scorer, toy_tokenizer, tmp_path, kind):
    model = ScalarModel(make_scorer(kind).eval(), toy_tokenizer)
    assert model.bias == 0.0
    model.bias = 0.3125
    model.save_pretrained(tmp_path / "reward")
    assert json.loads((tmp_path / "reward" / "config.json").read_text())["demonstration_bias"] == 0.3125
    loaded = ScalarModel.load(ModelSource(path=str(tmp_path / "reward")), new_head=False)
    assert loaded.bias == 0.3125
    assert loaded.tokenizer.get_vocab() == toy_tokenizer.get_vocab()
    tokens, mask = padded(TEXTS, "right", 0)
    assert torch.equal(loaded(tokens, mask), model(tokens, mask))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    row = torch.tensor([[12, 13, 14]])
    ours = score_at_end(model(row, row > 0), row > 0)
    assert float(theirs(input_ids=row).logits) + 0.3125 == pytest.approx(float(ours), abs=1e-5)


def test_folder_names_no_padding_token_that_ends_texts(make_scorer, toy_tokenizer, tmp_path):
    """The toy tokenizer ends texts with 0 and turns with 4; the token of the beginning, 1, is left to pad with."""
    for name, pad in {"none": None, "end": 0, "turn": 4}.items():
        ScalarModel(make_scorer(pad_token_id=pad), toy_tokenizer).save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["pad_token_id"] == 1
        assert AutoTokenizer.from_pretrained(tmp_path / name).pad_token_id == 1
    toy_tokenizer.bos_token = None
    ScalarModel(make_scorer(pad_token_id=0, bos_token_id=None), toy_tokenizer).save_pretrained(tmp_path / "only")
    assert json.loads((tmp_path / "only" / "config.json").read_text()).get("pad_token_id") is None
    ScalarModel(make_scorer(pad_token_id=35), toy_tokenizer).save_pretrained(tmp_path / "own")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["pad_token_id"] == 35


# Adapters


@pytest.fixture
def adapted_scorer(make_folder, lora):
    def make(**options):
        torch.manual_seed(3)
        folder = make_folder(scorer=True, demonstration_bias=0.5)
        return ScalarModel.load(ModelSource(path=folder, peft=lora(**options)), new_head=False)

    return make


def test_adapted_reward_model_trains_its_head_and_adapter(adapted_scorer):
    model = adapted_scorer()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained)
    assert any("score" in name for name in trained)
    assert not any("lora" not in name and "score" not in name for name in trained)


def test_merged_reward_folder_equals_the_adapted_model(adapted_scorer, tmp_path):
    model = adapted_scorer()
    tokens, mask = padded(TEXTS, "left", 0)
    model.save_pretrained(tmp_path / "merged", merge_adapter=True)
    loaded = ScalarModel.load(ModelSource(path=str(tmp_path / "merged")), new_head=False)
    assert loaded.bias == 0.5
    assert torch.allclose(loaded(tokens, mask), model(tokens, mask), atol=1e-4)


def test_adapter_folder_of_a_reward_model_round_trips(adapted_scorer, tmp_path):
    model = adapted_scorer()
    tokens, mask = padded(TEXTS, "left", 0)
    model.bias = 2.0
    model.save_pretrained(tmp_path / "adapter")
    loaded = ScalarModel.load(ModelSource(path=str(tmp_path / "adapter")), new_head=False)
    assert loaded.bias == 2.0
    assert torch.allclose(loaded(tokens, mask), model(tokens, mask), atol=1e-4)


def test_one_source_serves_policy_and_value(make_folder, lora):
    """`PPOModule(policy=source, advantage=GAE())` builds both from it."""
    source = ModelSource(path=make_folder(), peft=lora())
    source.causal_lm()
    assert source.peft.task_type is None
    assert any("score" in name for name, p in source.scorer(new_head=True).named_parameters() if p.requires_grad)


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_reward_model_starts_from_an_adapted_language_model(make_folder, toy_tokenizer, lora, tmp_path, task):
    """Stage 1 with LoRA, its adapter exported as it is, then stage 2."""
    policy = PolicyModel(ModelSource(path=make_folder(), peft=lora(task_type=task)).causal_lm(), toy_tokenizer)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p.data, std=0.5)
    policy.save_pretrained(tmp_path / "sft")
    whole = policy.network.merge_and_unload().transformer.state_dict()
    with pytest.raises(ValueError, match="no trained scalar head"):
        ModelSource(path=str(tmp_path / "sft")).scorer(new_head=False)
    found = ModelSource(path=str(tmp_path / "sft")).scorer(new_head=True)
    for name, weight in found.transformer.state_dict().items():
        assert torch.allclose(weight, whole[name], atol=1e-6), name
    assert all(p.requires_grad for p in found.parameters())
