"""Random two-layer networks, a tokenizer known by heart, and trainers that print nothing."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shlex
import socket
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lightning_rlhf.rewards import Reward
from lightning_rlhf.types import PromptBatch, Rollout, TextBatch


def pytest_collection_finish() -> None:
    """What is imported stays: collecting garbage does not look through it, a quarter of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_seed_of_an_earlier_test() -> Iterator[None]:
    """Lightning's `seed_everything` leaves the seed in the environment, from which our seeds are taken."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)


END = 0
LETTERS = {letter: 10 + place for place, letter in enumerate(string.ascii_lowercase)}  # a is 10, …, z is 35
SPECIAL = {"</s>": 0, "<s>": 1, "<unk>": 2, "<|im_start|>": 3, "<|im_end|>": 4, "user": 5, "assistant": 6, "system": 7}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _config(kind: str, vocab: int, end: int | list[int], width: int, **extra: Any) -> GPT2Config | LlamaConfig:
    ids = {"bos_token_id": 1, "eos_token_id": end, "pad_token_id": END, "initializer_range": 0.4} | extra
    if kind == "gpt2":
        ids = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1} | ids  # the library must switch it off
        return GPT2Config(vocab_size=vocab, n_positions=64, n_embd=width, n_head=2, **({"n_layer": 2} | ids))
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_dropout=0.1,
        **({"num_hidden_layers": 2} | ids),
    )


@pytest.fixture(scope="session")
def make_lm() -> Callable[..., nn.Module]:
    """A random language model; the same seed gives the same weights. Weights are wide, so that no row is uniform."""

    def make(kind: str = "gpt2", *, vocab: int = 36, end: Any = END, seed: int = 0, width: int = 16, **extra) -> Any:
        torch.manual_seed(seed)
        kinds = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}
        return kinds[kind](_config(kind, vocab, end, width, **extra))

    return make


@pytest.fixture(scope="session")
def make_scorer() -> Callable[..., nn.Module]:
    """A random sequence-classification network with one label."""

    def make(kind: str = "gpt2", *, vocab: int = 36, end: int = END, seed: int = 0, width: int = 16, **extra) -> Any:
        torch.manual_seed(seed)
        kinds = {"gpt2": GPT2ForSequenceClassification, "llama": LlamaForSequenceClassification}
        return kinds[kind](_config(kind, vocab, end, width, num_labels=1, **extra))

    return make


def _tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(["</s>", "<s>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[], PreTrainedTokenizerFast]:
    """One token per letter, a is 10; end token 0; a chat template."""
    return lambda: _tokenizer(SPECIAL | LETTERS)


@pytest.fixture
def toy_tokenizer(make_tokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def other_tokenizer() -> PreTrainedTokenizerFast:
    """The same words under other ids: a is 35, …, z is 10."""
    return _tokenizer(SPECIAL | {letter: 45 - place for letter, place in LETTERS.items()})


@pytest.fixture
def make_folder(tmp_path: Path, make_lm, make_scorer, toy_tokenizer) -> Callable[..., str]:
    """A model folder with tokenizer; `scorer=True` for a reward model."""
    numbers = itertools.count()

    def make(kind: str = "gpt2", *, scorer: bool = False, tokenizer: Any = None, **options) -> str:
        folder = tmp_path / f"model{next(numbers)}"
        (make_scorer if scorer else make_lm)(kind, **options).save_pretrained(folder)
        (tokenizer or toy_tokenizer).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def left_padded() -> Callable[..., PromptBatch]:
    """Prompts of token ids as a batch; `extra` more columns of padding; `fill` stands in padding."""

    def make(
        prompts: Sequence[Sequence[int]],
        *,
        rows: Sequence[dict] | None = None,
        extra: int = 0,
        fill: int = END,
        counts: Sequence[bool] | None = None,
    ) -> PromptBatch:
        width = max(map(len, prompts)) + extra
        tokens = torch.tensor([[fill] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
        rows = [{"prompt": f"p{i}"} for i in range(len(prompts))] if rows is None else list(rows)
        return PromptBatch(tokens, mask, torch.tensor(counts or [True] * len(prompts)), rows)

    return make


@pytest.fixture(scope="session")
def right_padded() -> Callable[..., TextBatch]:
    """Texts of token ids as a batch; the first `context` tokens of a row are given."""

    def make(texts: Sequence[Sequence[int]], *, context: int = 1, fill: int = END) -> TextBatch:
        width = max(map(len, texts))
        tokens = torch.tensor([list(t) + [fill] * (width - len(t)) for t in texts])
        mask = torch.tensor([[True] * len(t) + [False] * (width - len(t)) for t in texts])
        return TextBatch(tokens, mask, mask & (torch.arange(width) >= context))

    return make


@pytest.fixture(scope="session")
def as_loader() -> Callable[[Sequence[Any]], DataLoader]:
    """Ready batches, served in turn."""

    def make(batches: Sequence[Any]) -> DataLoader:
        return DataLoader(list(batches), batch_size=None, shuffle=False, collate_fn=lambda batch: batch)

    return make


COSTS = ("time/", "throughput/", "memory/")  # of this machine, now: no two runs agree


class Recorder(Callback):
    """Every rollout's logged numbers, but for what it cost."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.steps.append({name: value for name, value in logged.items() if not name.startswith(COSTS)})


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A quiet trainer on one CPU, in float64 unless told otherwise."""

    def make(**options: Any) -> Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        usual = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "precision": "64-true"}
        usual |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, "default_root_dir": tmp_path}
        return Trainer(**(quiet | usual | options))

    return make


class TokenReward(Reward):
    """A number of the response's tokens alone: Σ table[token]·0.7^t, so that order and length matter."""

    def __init__(self, seed: int = 3, vocab: int = 36, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = scale * torch.randn(vocab, generator=generator, dtype=torch.float64)

    def __call__(self, rollout: Rollout, rows: Sequence[Any]) -> Tensor:
        responses = rollout.tokens[:, rollout.prompt_width :]
        weight = 0.7 ** torch.arange(responses.shape[1], dtype=torch.float64)
        return torch.where(rollout.response_mask, self.table[responses] * weight, 0.0).sum(1)


@pytest.fixture
def token_reward() -> Callable[..., TokenReward]:
    return TokenReward


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, Sequence[dict]], str]:
    """Rows to a JSONL file; its path."""

    def write(name: str, rows: Sequence[dict]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def forking_python() -> Iterator[str]:
    """An executable that stands for `python`: its programs are forks of one process, which imports once.

    `sys.executable` of the programs is the same. Not for those that ask a GPU or measure what importing costs.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        executable, address = Path(folder, "python"), str(Path(folder, "socket"))  # short: 108 bytes at most
        listener.bind(address)
        listener.listen(64)
        here = Path(__file__).parent
        client = [sys.executable, "-ISB", str(here / "fork_client.py"), str(executable), address]
        executable.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n', encoding="utf-8")
        executable.chmod(0o755)
        server = subprocess.Popen(
            [sys.executable, str(here / "fork_server.py"), str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"},
        )
        yield str(executable)
        server.communicate()
