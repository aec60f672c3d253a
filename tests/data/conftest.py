"""Tokenizers small enough to know by heart: a is 10, b is 11, …, z is 35."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = {"</s>": 0, "<s>": 1, "<unk>": 2, "<|im_start|>": 3, "<|im_end|>": 4, "user": 5, "assistant": 6, "system": 7}
VOCABULARY = SPECIAL | {letter: 10 + place for place, letter in enumerate(string.ascii_lowercase)}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHT = {"<think>": 40, "</think>": 41, "<tool>": 42, "</tool>": 43}
QWEN3 = (
    "{% if tools %}<tool> {% for t in tools %}{{ t.name }} {% endfor %}</tool>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %} <tool> {{ c.function.name }} </tool>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def _tokenizer(single: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(["</s>", "<s>", "<|im_start|>", "<|im_end|>"])
    if single:
        backend.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    """End token 0; no opening token, no pad token, no template."""
    return _tokenizer(eos_token="</s>")


@pytest.fixture
def opening() -> PreTrainedTokenizerFast:
    """Puts <s> (1) before every text; end token 0."""
    return _tokenizer("<s> $A", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def closing() -> PreTrainedTokenizerFast:
    """Puts <s> before and </s> after every text."""
    return _tokenizer("<s> $A </s>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def chat() -> PreTrainedTokenizerFast:
    """ChatML whose template also writes <s>; adds <s> to plain text itself; end token <|im_end|> (4), pad </s> (0)."""
    tokenizer = _tokenizer("<s> $A", bos_token="<s>", eos_token="<|im_end|>", pad_token="</s>")
    tokenizer.chat_template = "<s>" + CHATML
    return tokenizer


@pytest.fixture
def thinking() -> PreTrainedTokenizerFast:
    """Writes tools, reasoning and tool calls as Qwen3 does; <think> is 40 and </think> 41, <tool> 42 and </tool> 43."""
    tokenizer = _tokenizer(eos_token="<|im_end|>", pad_token="</s>")
    tokenizer.backend_tokenizer.model = WordLevel(VOCABULARY | THOUGHT, unk_token="<unk>")
    tokenizer.chat_template = QWEN3
    return tokenizer


@pytest.fixture
def endless() -> PreTrainedTokenizerFast:
    """No end token."""
    return _tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Rows to a JSONL file; its path."""

    def write(name: str, rows: list[Any]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
