"""What the switches run on: random networks of two layers, folders of them, files of a few rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from lightning_rlhf.types import PromptBatch, TextBatch

ENDS = list(range(10))  # any of these ends a response, so that lengths are ragged; prompts have none
PROMPTS = [[12, 13], [10], [14, 15, 16, 11], [17]]
TEXTS = [[12, 13, 14, 0], [10, 11, 0], [14, 15, 16, 11, 30, 0], [17, 0]]
RANKED = {"responses": ["c d", "e", "f g h"], "scores": [1, 0, 0.5]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": x, "question": f"{x} z"} for x in ("a", "b c", "d e f g h", "i j")],
    "other_prompts": [{"prompt": x, "question": f"{x} z"} for x in ("k l", "m", "n o p", "q")],
    "demonstrations": [{"prompt": x, "question": f"{x} z", "response": "c d"} for x in ("a b", "e", "f g h i", "j")],
    "other_demonstrations": [{"prompt": x, "question": f"{x} z", "response": "r s t"} for x in ("k", "l m")],
    "labeled": [
        {"prompt": x, "question": f"{x} z", "response": "c d", "label": good}
        for x, good in {"a b": True, "e": False, "f g h i": True, "j": False}.items()
    ],
    "other_labeled": [
        {"prompt": x, "question": f"{x} z", "response": "r s t", "label": x == "k"} for x in ("k", "l m")
    ],
    "rankings": [{"prompt": x, "question": f"{x} z"} | RANKED for x in ("a b", "e", "f g h i", "j")],
    "other_rankings": [{"prompt": x, "question": f"{x} z"} | RANKED for x in ("k", "l m")],
    "texts": [{"text": "a b c d e f g h " * 3}, {"text": "i j k l m n o p " * 3}],
    "other_texts": [{"text": "q r s t u v w x " * 3}],
}


class Bench:
    """Built once: nothing writes into it, for a run gets copies of what it trains.

    Attributes:
        policy: a language model; `other_policy` has other weights.
        scorer: a reward model; `other_scorer` has other weights.
        tokenizer: of all of them; `other_tokenizer` has the same letters under other ids.
        prompts: a batch; so is `texts`.
    """

    def __init__(
        self,
        root: Path,
        *,
        lm: Callable[..., nn.Module],
        scorer: Callable[..., nn.Module],
        tokenizer: PreTrainedTokenizerFast,
        left_padded: Callable[..., PromptBatch],
        right_padded: Callable[..., TextBatch],
    ) -> None:
        self.root = root
        self.policy, self.other_policy = (lm(end=ENDS, seed=seed, width=8).double() for seed in (0, 1))
        self.scorer, self.other_scorer = (scorer(seed=seed, width=8).double() for seed in (2, 3))
        self.tokenizer, self.other_tokenizer = tokenizer, _renumbered(tokenizer)
        self.prompts, self.texts = left_padded(PROMPTS), right_padded(TEXTS)

    def folder(self, network: nn.Module) -> str:
        """Of its own at every call, with the network and the tokenizer."""
        path = self._new("model")
        copy.deepcopy(network).float().save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        return str(path)

    def file(self, name: str) -> str:
        """Path of one of `ROWS`."""
        path = self.root / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]), encoding="utf-8")
        return str(path)

    def empty(self) -> Path:
        """A folder of its own at every call."""
        path = self._new("empty")
        path.mkdir()
        return path

    def trainer(self, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
        """A quiet trainer in float64 on one CPU."""
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        usual = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "precision": "64-true"}
        usual |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, "default_root_dir": self.root}
        return Trainer(callbacks=list(callbacks), **(quiet | usual | options))

    def _new(self, name: str) -> Path:
        return self.root / f"{name}{sum(1 for _ in self.root.glob(name + '*'))}"


def _renumbered(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """a is 35, …, z is 10."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {word: n if n < len(ENDS) else 45 - n for word, n in vocabulary.items()}
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>", bos_token="<s>"
    )
    other.chat_template = tokenizer.chat_template
    return other
