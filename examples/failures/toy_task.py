"""A random GPT-2 that speaks letters, its tokenizer, its prompts, and rewards that can be gamed."""

from __future__ import annotations

import copy
import itertools
import string

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lightning_rlhf.engines import LocalEngine
from lightning_rlhf.models import PolicyModel

END, LETTERS, VOWELS = "</s>", string.ascii_lowercase[:16], frozenset("aeio")
VOCABULARY = {END: 0, "<unk>": 1} | {letter: place for place, letter in enumerate(LETTERS, start=2)}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    words = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, unk_token="<unk>")


def network(seed: int) -> GPT2LMHeadModel:
    """Two layers of width 32; the weights are wide, so that no next-token distribution is uniform."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=32,
        n_embd=32,
        n_head=2,
        n_layer=2,
        bos_token_id=VOCABULARY["<unk>"],
        eos_token_id=VOCABULARY[END],
        pad_token_id=VOCABULARY[END],
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config)


def prompts() -> list[dict[str, str]]:
    """Pairs of letters; of eight, six are always scored 0 by `by_level`, one always 1, and one can be learned."""
    pairs = itertools.product(LETTERS, LETTERS)
    levels = itertools.cycle(["hopeless"] * 6 + ["solved", "open"])
    return [{"prompt": " ".join(pair), "level": level} for pair, level in zip(pairs, levels, strict=False)]


def vowels(prompts: list[str], responses: list[str], **columns: list[str]) -> list[float]:
    """Share of a response's letters that are vowels."""
    words = [response.split() for response in responses]
    return [sum(letter in VOWELS for letter in row) / max(len(row), 1) for row in words]


def variety(prompts: list[str], responses: list[str], **columns: list[str]) -> list[float]:
    """Share of the vowels that a response has, which is what was meant by `vowels`."""
    return [len(VOWELS & set(response.split())) / len(VOWELS) for response in responses]


def vowels_and_length(prompts: list[str], responses: list[str], **columns: list[str]) -> list[float]:
    """`vowels`, and a twentieth for each letter."""
    shares = vowels(prompts, responses)
    return [share + len(response.split()) / 20 for share, response in zip(shares, responses, strict=True)]


def by_level(prompts: list[str], responses: list[str], level: list[str], **columns: list[str]) -> list[float]:
    """1 for a solved prompt and 0 for a hopeless one whatever is said; an open one asks for its own first letter."""
    known = {"solved": 1.0, "hopeless": 0.0}
    named = [float(prompt[0] in response.split()) for prompt, response in zip(prompts, responses, strict=True)]
    return [known.get(kind, score) for kind, score in zip(level, named, strict=True)]


class StaleEngine(LocalEngine):
    """An engine outside whose transfer of weights fails unseen: it samples from those of the start.

    Args:
        honest: it says by which weights it sampled; otherwise it claims today's.
    """

    is_external = True

    def __init__(self, honest: bool) -> None:
        super().__init__()
        self.honest = honest

    def load(self, policy: PolicyModel, version: int) -> None:
        """Take the first weights and no others."""
        if self.policy is None:
            super().load(copy.deepcopy(policy), version)
        if not self.honest:
            self.version = version
