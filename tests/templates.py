"""Chat templates as six families of models write them, each with a tokenizer that reads any text."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

HERMES_TOOLS = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}"
)
CALLS = (
    "{% if m.tool_calls %}{% for c in m.tool_calls %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "{% endif %}"
)


class Family(NamedTuple):
    """A template with the tokens it is made of.

    Attributes:
        template: in Jinja.
        special: its special tokens; the first ends a turn.
        takes_tools: whether it writes schemas and results.
        drops_thoughts: whether it leaves `<think>` out of a turn that a user's message follows.
    """

    template: str
    special: list[str]
    takes_tools: bool
    drops_thoughts: bool = False


FAMILIES = {
    "chatml": Family(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<|im_end|>", "<|im_start|>"],
        takes_tools=False,
    ),
    "hermes": Family(
        HERMES_TOOLS
        + "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
        "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        + CALLS
        + "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<|im_end|>", "<|im_start|>"],
        takes_tools=True,
    ),
    "thinking": Family(
        HERMES_TOOLS + "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
        "<|im_start|>user{% endif %}\n<tool_response>\n{{ m.content }}\n</tool_response>"
        "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
        "{% else %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 < ns.last %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
        + CALLS
        + "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<|im_end|>", "<|im_start|>"],
        takes_tools=True,
        drops_thoughts=True,
    ),
    "dated": Family(
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: "
        "{{ strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}\n\n"
        "{% if tools %}{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}{% endif %}<|eot_id|>"
        "{% for m in messages %}{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
        "{{ m.content | tojson }}<|eot_id|>{% elif m.tool_calls %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "{{ m.tool_calls[0].function.name }}", '
        '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
        "<|eot_id|>{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        takes_tools=True,
    ),
    "instruct": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        ["</s>"],
        takes_tools=False,
    ),
    "turns": Family(
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<end_of_turn>", "<start_of_turn>"],
        takes_tools=False,
    ),
}

CORPUS = [
    "the answer is 12 and the door opens",
    'Add two numbers: {"name": "add", "arguments": {}}',
    "ärger, naïve 東京",
] * 3


@cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the family's special tokens and template."""
    special = list(dict.fromkeys(["<s>", "<|endoftext|>", *FAMILIES[family].special]))
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet))
    built = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>", extra_special_tokens=special[2:]
    )
    built.chat_template = FAMILIES[family].template
    return built
