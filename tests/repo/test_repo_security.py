"""Nothing that was downloaded runs, and nothing reaches the network but a hub name."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_rlhf import LearnedReward, ModelSource, RewardModule, SFTModule
from lightning_rlhf.cli import main
from lightning_rlhf.cli.consent import objection
from lightning_rlhf.models.checkpoint import read_checkpoint

CANARY = "canary_of_security"


@pytest.fixture
def canary(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that could be imported, and leaves a file when it is."""
    (workplace / f"{CANARY}.py").write_text(
        "from pathlib import Path\nPath('sung').touch()\nclass Own: pass\nfn = Own\n"
    )
    monkeypatch.syspath_prepend(workplace)
    yield workplace / "sung"
    sys.modules.pop(CANARY, None)


class Reached(BaseException):
    """No error that a client could catch in order to try again."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses that anything wanted to reach; nothing is reached."""
    found: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        found.append(arguments)
        raise Reached

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return found


def folder(tiny: Any, place: Path, kind: str = "policy", **changes: Any) -> Path:
    """A copy of a good folder with another config, and the canary in it."""
    copy = place / "downloaded"
    shutil.copytree(getattr(tiny, kind), copy)
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text(f"import {CANARY}\nfrom transformers import LlamaForCausalLM as Own\n")
    return copy


# The network


def test_fit_from_folders_asks_no_network(ppo: Any, tiny: Any, workplace: Path, asked: list[Any]) -> None:
    main(["fit", *ppo(model__reference__path=tiny.policy)])
    assert (workplace / "runs/ppo/model/model.safetensors").is_file()
    assert asked == []


@pytest.mark.parametrize("path", ["/none/model", "runs/sft/model", "./model", "~/model", "here/model", "", "a b"])
def test_missing_path_asks_no_network(path: str, workplace: Path, asked: list[Any]) -> None:
    (workplace / "here").mkdir()
    for use in (ModelSource(path=path).causal_lm, ModelSource(path=path).tokenizer, LearnedReward(path).load):
        with pytest.raises(ValueError, match="there is no folder"):
            use()
    assert asked == []


@pytest.mark.parametrize("path", ["some-model", "some-owner/some-model"])
def test_hub_name_asks_the_network(path: str, workplace: Path, asked: list[Any]) -> None:
    """The negative control: a name does reach for it."""
    with pytest.raises(Reached):
        ModelSource(path=path).causal_lm()
    assert asked


@pytest.mark.parametrize("where", ["typed", "in a config", "part of a config"])
def test_config_is_not_fetched(where: str, ppo: Any, workplace: Path, asked: list[Any], capsys: Any) -> None:
    address = "http://127.0.0.1:9/own.yaml"
    arguments = ppo()
    (workplace / "own.yaml").write_text(f"{'config' if where == 'in a config' else 'model'}: {address}\n")
    with pytest.raises(SystemExit):
        main(["validate", *arguments, "--config", address if where == "typed" else "own.yaml"])
    assert asked == []


def test_checkpoint_that_a_config_names_is_not_fetched(
    ppo: Any, workplace: Path, asked: list[Any], capsys: Any
) -> None:
    address = "http://127.0.0.1:9/last.ckpt"
    (workplace / "own.yaml").write_text(f"ckpt_path: {address}\n")
    with pytest.raises(SystemExit):
        main(["validate", *ppo(), "--config", "own.yaml"])
    assert f"type it, --ckpt_path={address}" in capsys.readouterr().err
    assert asked == []
    with pytest.raises((Reached, OSError)):  # the negative control
        main(["validate", *ppo(), f"--ckpt_path={address}"])
    assert asked


def adapter(tiny: Any, place: Path, **changes: Any) -> Path:
    """A folder with a LoRA adapter of the policy."""
    peft = pytest.importorskip("peft")
    network = peft.get_peft_model(
        ModelSource(path=tiny.policy).causal_lm(),
        peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    network.save_pretrained(place / "adapter")
    file = place / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": tiny.policy} | changes))
    return place / "adapter"


def test_adapter_that_loads_others_is_refused(tiny: Any, workplace: Path, asked: list[Any]) -> None:
    path = adapter(tiny, workplace, peft_type="XLORA", adapters={"one": "some-owner/some-adapter"}, hidden_size=16)
    with pytest.raises(ValueError, match=r"`peft_type` is 'XLORA', which may load more.*LORA"):
        ModelSource(path=str(path)).causal_lm()
    assert asked == []


@pytest.mark.parametrize("left", ["x.safetensors", "adapter_model.bin"])
def test_adapter_without_its_weights_asks_no_network(left: str, tiny: Any, workplace: Path, asked: list[Any]) -> None:
    path = adapter(tiny, workplace)
    (path / "adapter_model.safetensors").rename(path / left)
    (path / "x.safetensors").touch()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        ModelSource(path=path.name).causal_lm()
    assert asked == []


@pytest.mark.parametrize("cached", [True, False])
def test_base_of_a_hub_is_read_from_the_cache_alone(
    cached: bool, tiny: Any, workplace: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = adapter(tiny, workplace, base_model_name_or_path="some-owner/some-model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(workplace / "cache"))
    place = workplace / "cache" / "models--some-owner--some-model"
    if cached:
        shutil.copytree(tiny.policy, place / "snapshots" / ("a" * 40))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("a" * 40)
        assert ModelSource(path=str(path)).causal_lm().config.hidden_size == 16
    else:
        with pytest.raises(ValueError, match="not in the local cache.*hf download some-owner/some-model"):
            ModelSource(path=str(path)).causal_lm()
    assert asked == []


# Code


def test_canary_sings_when_it_is_named_by_the_user(canary: Path, ppo: Any) -> None:
    """The negative control: the config's own dotted path is imported."""
    with pytest.raises((SystemExit, TypeError, ValueError)):
        main(["validate", *ppo(model__reward__path=None), f"--model.reward={CANARY}.nothing"])
    assert canary.exists()


def test_rows_import_nothing(canary: Path, tiny: Any, ppo: Any, workplace: Path) -> None:
    named = {"class_path": f"{CANARY}.Own", "init_args": {}}
    rows = [{"prompt": "a b", "answer": "1", "reward": named, "fn": f"{CANARY}.fn", "__reduce__": named}] * 4
    (workplace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["fit", *ppo(data__train="rows.jsonl")])
    assert not canary.exists()


@pytest.mark.parametrize("own_type", [True, False])
def test_model_folder_imports_nothing(own_type: bool, canary: Path, tiny: Any, workplace: Path) -> None:
    named = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    path = folder(tiny, workplace, auto_map=named, **({"model_type": "own"} if own_type else {}))
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": named}))
    source = ModelSource(path=str(path))
    if own_type:
        with pytest.raises(ValueError, match="can't load"):
            source.causal_lm()
    else:
        source.causal_lm()
        source.tokenizer()
    assert not canary.exists()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("use", [read_checkpoint, lambda path: LearnedReward(path).load()])
def test_pickle_in_a_checkpoint_does_not_run(use: Any, workplace: Path) -> None:
    torch.save({"state_dict": {}, "x": Bomb()}, "bomb.ckpt")
    with pytest.raises(ValueError, match="pickle"):
        use("bomb.ckpt")
    assert not Path("exploded").exists()
    torch.load("bomb.ckpt", weights_only=False)  # the negative control
    assert Path("exploded").exists()


def checkpoint(**hyperparameters: Any) -> str:
    instantiator = "lightning.pytorch.cli.instantiate_module"
    content = {"state_dict": {}, "hyper_parameters": hyperparameters | {"_instantiator": instantiator}}
    torch.save(content | {"pytorch-lightning_version": "2.6.0"}, "kept.ckpt")
    return "kept.ckpt"


@pytest.mark.parametrize("kind", [SFTModule, RewardModule])
def test_hyperparameters_of_a_checkpoint_import_nothing(kind: Any, canary: Path, tiny: Any) -> None:
    for named in ({"optimizer": f"{CANARY}.fn"}, {"schedule": {"class_path": f"{CANARY}.Own"}}):
        path = checkpoint(model={"path": tiny.policy}, **named)
        with pytest.raises(ValueError, match=f"names {CANARY}.*not imported.*`import {CANARY}` first"):
            kind.load_from_checkpoint(path)
    assert not canary.exists()


def test_checkpoint_does_not_turn_on_code(canary: Path, tiny: Any, workplace: Path) -> None:
    path = folder(tiny, workplace, "reward", model_type="own", auto_map={"AutoConfig": "own.Own"})
    state = {"model._extra_state": {"demonstration_bias": 0.0}}
    source = {"path": str(path), "trust_remote_code": True}
    torch.save({"state_dict": state, "rlhf": {"model": source}}, "kept.ckpt")
    with pytest.raises(ValueError, match="can't load"):
        LearnedReward("kept.ckpt").load()
    assert not canary.exists()


# Consent

POLICY = {"model": {"init_args": {"policy": {"trust_remote_code": True}}}}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.policy.trust_remote_code=true"],
        ["--model.policy.trust_remote_code", "True"],
        ["--model.init_args.policy.trust_remote_code=1"],
    ],
)
def test_typed_flag_consents(arguments: list[str]) -> None:
    assert objection(POLICY, arguments) is None


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config=downloaded.yaml"],
        ["--model.policy.trust_remote_code=false"],
        ["--model.reference.trust_remote_code=true"],  # of another network
        ["--model.policy", "{path: x, trust_remote_code: true}"],
    ],
)
def test_anything_else_does_not(arguments: list[str]) -> None:
    assert "--model.policy.trust_remote_code=true" in str(objection(POLICY, arguments))


def test_consent_is_asked_for_at_any_depth() -> None:
    inside = {"model": {"init_args": {"parts": [{"dict_kwargs": {"trust_remote_code": "yes"}}]}}}
    assert objection(inside, ["--model.policy.trust_remote_code=true"]) is not None
    assert objection({"weights_only": False}, []) is not None
    assert objection({"weights_only": None, "model": {"trust_remote_code": False}}, []) is None
