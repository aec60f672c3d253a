from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_rlhf.text.encoder import Encoder, load_tokenizer

# a is 10, b is 11, c is 12; <s> 1, </s> 0; <|im_start|> 3, <|im_end|> 4, user 5, assistant 6, system 7


def test_text_prompt_keeps_what_the_tokenizer_adds(plain: Any, opening: Any) -> None:
    assert Encoder(plain).prompt("a b").tolist() == [10, 11]
    assert Encoder(opening).prompt("a b").tolist() == [1, 10, 11]


def test_opening_token_is_there_exactly_once(opening: Any, chat: Any) -> None:
    assert Encoder(opening).prompt("<s> a").tolist() == [1, 10]
    assert Encoder(chat).prompt([{"role": "user", "content": "a"}]).tolist() == [1, 3, 5, 10, 4, 3, 6]


def test_prompt_is_not_closed_by_a_tokenizer_that_closes_texts(closing: Any) -> None:
    assert closing("a b")["input_ids"] == [1, 10, 11, 0]
    assert Encoder(closing).prompt("a b").tolist() == [1, 10, 11]
    assert Encoder(closing).document("a b").tolist() == [1, 10, 11, 0]


def test_prompt_role_wraps_text_and_leaves_messages(chat: Any) -> None:
    assert Encoder(chat).prompt("a").tolist() == [1, 10]
    assert Encoder(chat, prompt_role="user").prompt("a").tolist() == [1, 3, 5, 10, 4, 3, 6]
    assert Encoder(chat, prompt_role="system").prompt("a").tolist() == [1, 3, 7, 10, 4, 3, 6]
    messages = [{"role": "user", "content": "b"}]
    assert Encoder(chat, prompt_role="system").prompt(messages).tolist() == [1, 3, 5, 11, 4, 3, 6]


def test_response_has_no_opening_and_one_end(opening: Any, chat: Any) -> None:
    assert Encoder(opening).response("b c").tolist() == [11, 12, 0]
    assert Encoder(opening).response("b </s>").tolist() == [11, 0]
    assert Encoder(opening).response("").tolist() == [0]
    assert Encoder(chat).response("b").tolist() == [11, 4]


def test_pad_is_the_end_token_where_there_is_none(plain: Any, chat: Any) -> None:
    assert (Encoder(plain).pad, Encoder(plain).end) == (0, 0)
    assert (Encoder(chat).pad, Encoder(chat).end) == (0, 4)


def test_missing_end_token_is_explained(endless: Any) -> None:
    with pytest.raises(ValueError, match="has no end token.*set one"):
        Encoder(endless)


def test_missing_template_is_explained(plain: Any) -> None:
    with pytest.raises(ValueError, match="has no chat template: set tokenizer.chat_template"):
        Encoder(plain).prompt([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="has no chat template"):
        Encoder(plain, prompt_role="user").prompt("a")


def test_empty_prompt_is_explained(plain: Any, opening: Any) -> None:
    with pytest.raises(ValueError, match="has no tokens: nothing to respond to"):
        Encoder(plain).prompt("  ")
    assert Encoder(opening).prompt("").tolist() == [1]


def test_tokenizer_loads_from_a_folder(chat: Any, tmp_path: Path) -> None:
    chat.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert Encoder(loaded).prompt([{"role": "user", "content": "a"}]).tolist() == [1, 3, 5, 10, 4, 3, 6]
    assert load_tokenizer(chat) is chat


def test_prompt_of_several_answers_is_tokenized_once(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, texts = Encoder(chat), []
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda text, **options: texts.append(text) or encode(text, **options))
    for prompt in ("a", [{"role": "user", "content": "a"}], "a"):
        texts.clear()
        found = [encoder.exchange(prompt, answer) for answer in ("b", "c")]
        assert (len(texts), found[0].prompt, found[0].response.tolist()) == (3, found[1].prompt, [11, 4])
