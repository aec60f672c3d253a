"""A policy, a reward model and data so small that a command of the command line takes about a second."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).parents[2]
WORDS = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", *string.digits, *string.ascii_lowercase]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": f"{letter} b c", "answer": str(i)} for i, letter in enumerate("adefghij")],
    "held_out": [{"prompt": f"x y {letter}", "answer": "1"} for letter in "klm"],
    "texts": [{"text": "a b c d e f g h " * 3}, {"text": "i j k l m n o p " * 3}],
    "demonstrations": [{"prompt": f"{letter} b", "response": "c d e"} for letter in "abcdefgh"],
    "labeled": [{"prompt": f"{letter} b", "completion": "c d e", "label": letter in "aceg"} for letter in "abcdefgh"],
    "rankings": [
        {"prompt": f"{letter} b", "responses": ["c d", "e", "f g h"], "scores": [1, 0, 0.5]} for letter in "abcdefgh"
    ],
}
QUIET = {
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "trainer.max_epochs": 1,
    "trainer.limit_train_batches": 2,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "trainer.log_every_n_steps": 1,
}


def flags(values: dict[str, Any]) -> list[str]:
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()]


class Tiny:
    """Folders and files to run commands on, and the arguments that name them.

    Attributes:
        policy: a two-layer Llama with its ChatML tokenizer, 42 words: digits and letters.
        reward: a two-layer Llama with a scalar head and the same tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.policy, self.reward = folder, str(folder / "policy"), str(folder / "reward")
        backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
        backend.pre_tokenizer = WhitespaceSplit()
        backend.add_special_tokens(["<pad>", "<|im_start|>", "<|im_end|>"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>")
        tokenizer.chat_template = CHATML
        ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 3}
        config = LlamaConfig(**ids, **SIZES, num_labels=1)
        torch.manual_seed(0)
        for path, kind in ((self.policy, LlamaForCausalLM), (self.reward, LlamaForSequenceClassification)):
            kind(config).save_pretrained(path)
            tokenizer.save_pretrained(path)
        for name, rows in ROWS.items():
            Path(self.file(name)).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def file(self, name: str) -> str:
        """Path of one of `ROWS`."""
        return str(self.folder / f"{name}.jsonl")

    def required(self, config: Path) -> dict[str, Any]:
        """What a user must give beside `config`: folders and files."""
        module = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
        if module["class_path"] == "SFTModule":
            return {"model.model.path": self.policy, "data.train": self.file("demonstrations")}
        if module["class_path"] == "RewardModule":
            values = {"model.model.path": self.policy, "data.train": self.file("rankings")}
            return values | {"data.val": self.file("rankings"), "data.demonstrations": self.file("demonstrations")}
        if module["class_path"] == "PreferenceModule":
            rows = self.file("labeled" if module["init_args"]["loss"]["class_path"] == "KTO" else "rankings")
            return {"model.policy.path": self.policy, "data.train": rows, "data.val": rows}
        learned = isinstance(module["init_args"].get("reward"), dict)
        source = {"model.reward.path": self.reward} if learned else {"model.reference.path": self.policy}
        values = {"model.policy.path": self.policy} | source
        values |= {"data.train": self.file("prompts"), "data.val": self.file("held_out")}
        return values | (
            {"data.pretrain": self.file("texts")}
            if module["init_args"].get("algorithm", {}).get("init_args", {}).get("ptx_coef")
            else {}
        )

    def sizes(self, config: Path) -> dict[str, Any]:
        """What makes a run of `config` take about a second."""
        values = {**QUIET, "data.batch_size": 4, "data.eval_batch_size": 2}
        if "model.reward.path" in self.required(config):
            values |= {"model.updates.minibatch": 2, "model.updates.microbatch_tokens": 24}
            values |= {"model.generation.max_new_tokens": 4, "data.pretrain_ratio": 0.5, "data.text_tokens": 8}
            generation = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["init_args"]["generation"]
            if generation.get("samples_per_prompt", 1) > 4:
                values |= {"model.generation.samples_per_prompt": 4}
        return values

    def small(self, config: Path) -> list[str]:
        """`sizes` as flags, to stand behind a command that says all else."""
        return flags(self.sizes(config))

    def arguments(self, config: Path, **changes: Any) -> list[str]:
        """`config`, made small; `changes` have `__` for a dot, and None leaves an argument out."""
        values = self.required(config) | self.sizes(config)
        values |= {name.replace("__", "."): value for name, value in changes.items()}
        return ["--config", str(config), *flags({name: value for name, value in values.items() if value is not None})]

    def evaluation(self, command: str = "validate") -> list[str]:
        """configs/evaluate.yaml, made small: a policy against itself."""
        values = {name: value for name, value in QUIET.items() if name.split(".")[1] not in ("max_epochs",)}
        values = {
            name: value for name, value in values.items() if "train_batches" not in name and "log_every" not in name
        }
        values |= {
            "model.policy.path": self.policy,
            "model.reference.path": self.policy,
            "model.reward.path": self.reward,
        }
        values |= {"data.batch_size": 2, "data.text_tokens": 8, "model.generation.max_new_tokens": 4}
        values |= {f"data.{'val' if command == 'validate' else 'test'}": self.file("held_out")}
        values |= {"data.val_pretrain": self.file("texts")}
        return ["--config", str(REPOSITORY / "configs" / "evaluate.yaml"), *flags(values)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Built once: nothing writes into it."""
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def ppo(tiny: Tiny) -> Callable[..., list[str]]:
    """Arguments of configs/ppo.yaml, made small."""
    return lambda **changes: tiny.arguments(REPOSITORY / "configs" / "ppo.yaml", **changes)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory for `runs/`; a command line without pytest's arguments, which Lightning would take."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-rlhf"])
    return tmp_path
