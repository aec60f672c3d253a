"""What ends a response: one set, of which data, decoding, rewards and exports all take what they need."""

from __future__ import annotations

import pytest

from lightning_rlhf.text import Encoder, end_tokens, turn_end

TURNS = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}END{% endfor %}"
ASKED = [{"role": "user", "content": "a"}]
# a is 10, b is 11; </s> 0, <s> 1, <|im_start|> 3, <|im_end|> 4, user 5, assistant 6


@pytest.mark.parametrize(
    ("written", "end"),
    [
        ("<|im_end|>\n", 4),  # ChatML
        (" </s>", 0),  # Llama 2
        ("\n<|im_end|>\n</s>", 4),  # the first one
        ("", None),
        ("\n", None),
        ("\nuser:", None),
        ("z <|im_end|>", None),
    ],
)
def test_turn_end_is_the_special_token_right_after_a_content(toy_tokenizer, written, end):
    toy_tokenizer.chat_template = TURNS.replace("END", written)
    assert turn_end(toy_tokenizer) == end


def test_turn_end_may_be_an_added_token(toy_tokenizer):
    toy_tokenizer.add_tokens(["<end_of_turn>"])
    toy_tokenizer.chat_template = TURNS.replace("END", "<end_of_turn>\n")
    assert turn_end(toy_tokenizer) == len(toy_tokenizer) - 1


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ messages[0]['content'] }}<|im_end|>"])
def test_template_that_writes_no_answer_has_no_turn_end(toy_tokenizer, template):
    toy_tokenizer.chat_template = template
    assert turn_end(toy_tokenizer) is None


def test_end_tokens_are_each_named_once_and_the_taught_one_first(toy_tokenizer):
    assert end_tokens(toy_tokenizer) == [4, 0]
    assert end_tokens(toy_tokenizer, [9, 0]) == [4, 0, 9]
    assert end_tokens(None, 9) == [9]
    assert end_tokens(None) == []
    toy_tokenizer.eos_token = "<|im_end|>"
    assert end_tokens(toy_tokenizer, 4) == end_tokens(toy_tokenizer, [4]) == [4]


def test_answer_to_a_dialogue_is_taught_the_end_of_a_turn(toy_tokenizer):
    """The tokenizer's own end, which no rendered dialogue holds, ends texts alone."""
    encoder = Encoder(toy_tokenizer)
    for answer in ("b", [{"role": "assistant", "content": "b"}], "b </s>", "b <|im_end|>", "b </s> <|im_end|>"):
        assert encoder.exchange(ASKED, answer).response.tolist() == [11, 4]
    assert Encoder(toy_tokenizer, prompt_role="user").exchange("a", "b").response.tolist() == [11, 4]
    assert encoder.exchange("a", "b").response.tolist() == [11, 0]
    assert encoder.exchange("a", "b </s>").response.tolist() == [11, 0]
    assert encoder.exchange("a", "b <|im_end|>").response.tolist() == [11, 4]  # a dialogue written out by hand
    assert encoder.document("b").tolist() == [11, 0]


def test_answer_to_a_dialogue_ends_as_texts_do_where_a_turn_has_no_end(toy_tokenizer):
    toy_tokenizer.chat_template = TURNS.replace("END", " z ")
    assert Encoder(toy_tokenizer).exchange(ASKED, "b").response.tolist() == [11, 0]


def test_answer_ends_the_same_everywhere_where_all_agree(toy_tokenizer):
    toy_tokenizer.eos_token = "<|im_end|>"
    encoder = Encoder(toy_tokenizer)
    for prompt in ("a", ASKED):
        assert encoder.exchange(prompt, "b").response.tolist() == [11, 4]
        assert encoder.exchange(prompt, "b </s>").response.tolist() == [11, 0, 4]  # here no end
