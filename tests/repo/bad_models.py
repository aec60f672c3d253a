"""Model folders, tokenizers and adapters that are torn, foreign, or do not go together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad_bench import Bench, Case, case
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

WEIGHTS = "model.safetensors"


def folder(name: str, make: Callable[[Bench], Any], *says: str) -> Case:
    """SFT on the folder that `make` returns."""
    return case(f"model-{name}", lambda bench: bench.sft(model=make(bench)), *says)


def changed(name: str, file: str, content: str | bytes, *says: str) -> Case:
    """A good folder in which one file has another content."""

    def make(bench: Bench) -> Path:
        copy = bench.folder()
        (copy / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        return copy

    return folder(name, make, *says)


def without(name: str, *files: str, says: tuple[str, ...]) -> Case:
    return folder(name, lambda bench: bench.folder(without=files), *says)


def torn(bench: Bench) -> Path:
    file = bench.folder() / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    return file.parent


def pickled(bench: Bench) -> Path:
    copy = bench.folder(without=(WEIGHTS,))
    torch.save({"x": torch.ones(1)}, copy / "pytorch_model.bin")
    return copy


def shards(bench: Bench) -> Path:
    copy = bench.folder()
    index = {"weight_map": {"a": WEIGHTS, "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    return copy


def tokenizer(**special: Any) -> Callable[[Bench], Path]:
    """A folder whose tokenizer has other special tokens, or words."""

    def make(bench: Bench) -> Path:
        copy = bench.folder(without=("tokenizer*", "special*", "chat_template*"))
        found = AutoTokenizer.from_pretrained(bench.tiny.policy)
        for name, value in special.items():
            if name == "words":
                found.add_tokens(value)
            else:
                setattr(found, name, value)
        found.save_pretrained(copy)
        return copy

    return make


def shuffled(bench: Bench, kind: str = "policy") -> Path:
    """A folder whose tokenizer has two words under each other's ids."""
    copy = bench.folder(kind)
    file = copy / "tokenizer.json"
    found = json.loads(file.read_text())
    words = found["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    return bench.change(file, model=found["model"])


def short(bench: Bench) -> Path:
    """A GPT-2 with 8 positions, and no more."""
    copy = bench.folder(without=(WEIGHTS, "config.json"))
    sizes = {"n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1, "eos_token_id": 3, "pad_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(AutoTokenizer.from_pretrained(copy)), **sizes)).save_pretrained(copy)
    return copy


def small(bench: Bench) -> Path:
    """A Llama with an embedding for 20 of the tokenizer's words."""
    copy = bench.folder(without=(WEIGHTS, "config.json"))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=20, eos_token_id=3, pad_token_id=0, **sizes)).save_pretrained(copy)
    return copy


def adapter(name: str, *says: str, weights: bool = True, **changes: Any) -> Case:
    def make(bench: Bench) -> Path:
        copy = bench.place / "adapter"
        copy.mkdir()
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
        config |= {"base_model_name_or_path": bench.tiny.policy}
        (copy / "adapter_config.json").write_text(json.dumps(config | changes))
        (copy / f"adapter_model.{'safetensors' if weights else 'bin'}").write_bytes(b"junk")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (copy / file).write_bytes((Path(bench.tiny.policy) / file).read_bytes())
        return copy

    return folder(f"adapter-{name}", make, *says)


def circle(bench: Bench, size: int) -> Path:
    """Adapters in a circle, each the base of the one before."""
    folders = [bench.place / f"adapter{n}" for n in range(size)]
    for n, folder in enumerate(folders):
        shutil.copytree(bench.tiny.policy, folder, ignore=shutil.ignore_patterns("config.json", WEIGHTS))
        config = {"peft_type": "LORA", "base_model_name_or_path": str(folders[(n + 1) % size])}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").write_bytes(b"junk")
    return folders[0]


def placed(name: str, put: Callable[[Path], object], *says: str, file: str = WEIGHTS) -> Case:
    """A good folder in which something else than a file stands in a file's place."""

    def make(bench: Bench) -> Path:
        copy = bench.folder(without=(file,))
        put(copy / file)
        return copy

    return folder(name, make, *says)


def sharded(name: str, index: str, *says: str) -> Case:
    return changed(f"shards-{name}", "model.safetensors.index.json", index, *says)


MESSAGES = {"prompt": [{"role": "user", "content": "a"}], "response": "b"}
WIDE = {"prompt": "a " * 20, "response": "b"}
FOLDERS = [
    folder("missing", lambda b: b.place / "none", "there is no folder .*none"),
    folder("missing-parents", lambda b: "runs/sft/model", "there is no folder runs/sft/model"),
    folder("missing-here", lambda b: "./model", "there is no folder ./model"),
    folder("missing-home", lambda b: "~/model", "there is no folder .*/model"),
    folder("no-name", lambda b: "a model", "there is no folder a model"),
    folder("a-file", lambda b: b.file("x", "model.safetensors"), "is a file; give the folder"),
    folder("empty", lambda b: (b.place / "empty").mkdir() or b.place / "empty", "holds no tokenizer"),
    without("no-config", "config.json", says=("has no config.json",)),
    without("no-weights", WEIGHTS, says=("holds no weights",)),
    without("no-tokenizer", "tokenizer*", says=("holds no tokenizer",)),
    folder("pickled", pickled, "pytorch_model.bin, and a pickle can run code", "safetensors"),
    folder("torn", torn, "can't load a model"),
    folder("shard-missing", shards, "lacks model-00002-of-00002.safetensors"),
    sharded("all-missing", '{"weight_map": {"a": "model-1.safetensors"}}', "lacks model-1.safetensors"),
    sharded("outside", '{"weight_map": {"a": "../x.safetensors"}}', "lacks ../x.safetensors"),
    sharded("list", '{"weight_map": ["model.safetensors"]}', "lacks a `weight_map`"),
    sharded("torn", '{"weight_map": {"a"', "index.json is no JSON"),
    placed("weights-loop", lambda path: path.symlink_to(path), "can't load a model"),
    placed("weights-folder", Path.mkdir, "can't load a model"),
    placed("weights-pipe", os.mkfifo, "can't load a model"),
    placed("config-loop", lambda path: path.symlink_to(path), "has no config.json", file="config.json"),
    folder("loop", lambda b: (b.place / "x").symlink_to(b.place / "x") or b.place / "x", "there is no folder"),
    changed("weights-empty", WEIGHTS, b"", "can't load a model"),
    changed("weights-junk", WEIGHTS, b"\xff" * 64, "can't load a model"),
    changed("weights-pointer", WEIGHTS, "version https://git-lfs.github.com/spec/v1\n", "can't load a model"),
    changed("config-empty", "config.json", "", "config.json is no JSON"),
    changed("config-list", "config.json", "[]", "config.json holds a JSON list"),
    changed("config-torn", "config.json", '{"model_type": "lla', "config.json is no JSON"),
    changed("config-binary", "config.json", b"\xff\x00", "config.json is no JSON"),
    changed("config-untyped", "config.json", "{}", "can't load"),
    folder("config-unknown-type", lambda b: b.folder(model_type="lama", architectures=["Lama"]), "can't load"),
    folder("config-text-size", lambda b: b.folder(hidden_size="wide"), "can't load"),
    folder("config-zero-heads", lambda b: b.folder(num_attention_heads=0), "can't load"),
    folder("config-other-width", lambda b: b.folder(hidden_size=32, head_dim=8), "can't load a model"),
    folder("config-more-layers", lambda b: b.folder(num_hidden_layers=3), "lacks .* of the weights", "model.layers.2"),
    folder("config-hub-kernel", lambda b: b.folder(attn_implementation="some/kernel"), "names code of a hub"),
    folder("own-code", lambda b: b.folder(model_type="own", auto_map={"AutoConfig": "own.Own"}), "can't load"),
    case("model-gguf-missing", lambda b: b.sft("--model.model.gguf_file=x.gguf"), "there is no file x.gguf"),
    case("model-gguf-junk", lambda b: b.sft("--model.model.gguf_file=config.json"), "can't load"),
]
TOKENIZERS = [
    changed("tokenizer-torn", "tokenizer.json", '{"version": "1.0", "mod', "tokenizer.json is no JSON"),
    changed("tokenizer-utf16", "tokenizer.json", "{}".encode("utf-16"), "tokenizer.json is no JSON"),
    changed("tokenizer-list", "tokenizer.json", "[1]", "tokenizer.json holds a JSON list"),
    changed("tokenizer-object", "tokenizer.json", "{}", "can't load a tokenizer"),
    changed("tokenizer-config-torn", "tokenizer_config.json", "{", "tokenizer_config.json is no JSON"),
    folder("tokenizer-no-end", tokenizer(eos_token=None), "has no end token"),
    folder("tokenizer-too-many-words", tokenizer(words=["more", "words"]), "lie beyond", "resize_token_embeddings"),
    folder("embedding-too-small", small, "embeds 20 tokens", "lie beyond"),
    case("tokenizer-of-data-missing", lambda b: b.sft("--data.tokenizer=/none/x"), "there is no folder /none/x"),
    case("tokenizer-of-model-missing", lambda b: b.sft("--model.tokenizer=/none/x"), "there is no folder /none/x"),
]
TOKENIZERS += [
    case(
        f"template-{name}",
        lambda b, template=template: b.sft(model=tokenizer(chat_template=template)(b), train=b.rows(MESSAGES)),
        "line 1: ",
        *says,
    )
    for name, template, says in (
        ("none", None, ("has no chat template",)),
        ("broken", "{% for m in messages %}", ("does not take these messages",)),
        ("raises", "{{ raise_exception('no') }}", ("does not take these messages",)),
        ("undefined", "{{ messages.nothing.at_all }}", ("does not take these messages",)),
        ("empty", "{# nothing #}", ("has no tokens",)),
    )
]
PAIRS = [
    case("pair-reference", lambda b: b.ppo(f"--model.reference.path={shuffled(b)}"), "another vocabulary", "reference"),
    case("pair-reference-small", lambda b: b.ppo(f"--model.reference.path={small(b)}"), "reference", "lie beyond"),
    case("pair-reward-no-head", lambda b: b.ppo(reward=b.tiny.policy), "no trained scalar head"),
    case("pair-reward-missing", lambda b: b.ppo(reward="runs/reward/model"), "there is no folder runs/reward/model"),
    case("pair-reward-small", lambda b: b.ppo(reward=b.folder("reward", vocab_size=20)), "can't load a model"),
    case(
        "pair-value",
        lambda b: b.ppo(
            f"--model.value.path={shuffled(b, 'reward')}",
            "--model.algorithm.advantage=GAE",
            "--model.algorithm.level=TokenLevel",
        ),
        *("another vocabulary", "value"),
    ),
    case("pair-too-long-sft", lambda b: b.sft(model=short(b), train=b.rows(WIDE)), "8 positions", "max_tokens"),
    case(
        "pair-too-long-reward",
        lambda b: b.reward(model=short(b), train=b.rows({"prompt": "a " * 20, "chosen": "b", "rejected": "c"})),
        *("8 positions", "max_tokens"),
    ),
    case(
        "pair-too-long-policy",
        lambda b: ["validate", *b.ppo(f"--data.val={b.rows(WIDE)}", policy=short(b))[1:]],
        *("8 positions", "max_prompt_tokens"),
    ),
]
ADAPTERS = [
    adapter("junk", "can't load an adapter"),
    adapter("pickled", "adapter_model.bin, and a pickle can run code", weights=False),
    adapter("no-base", "does not say which model", base_model_name_or_path=None),
    folder("adapter-of-itself", lambda b: circle(b, 1), "leads round to itself: name the model's folder"),
    folder("adapters-of-each-other", lambda b: circle(b, 2), "leads round to itself"),
    adapter("base-missing", "there is no folder runs/base/model", base_model_name_or_path="runs/base/model"),
    adapter("megatron", "import the module", megatron_config={"a": 1}, megatron_core="canary_of_the_adapter"),
    adapter("unknown-type", "`peft_type` is 'NONE_SUCH'", peft_type="NONE_SUCH"),
]
CASES = [*FOLDERS, *TOKENIZERS, *PAIRS, *ADAPTERS]
