"""A checkpoint is data: nothing in it runs, whether it is a file or a folder of shards."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.distributed import checkpoint as dcp
from torch.utils.data import DataLoader

from lightning_rlhf import ModelSource, PPOModule, RewardModule, SFTModule
from lightning_rlhf.cli import main
from lightning_rlhf.models.shards import check_folder

pytestmark = pytest.mark.usefixtures("workplace")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def exploded() -> bool:
    return Path("exploded").exists()


@pytest.fixture
def own_code(tiny: Any, workplace: Path) -> Callable[[str], Path]:
    """A model folder whose config and tokenizer come with code of their own, which explodes."""

    def made(kind: str) -> Path:
        folder = workplace / "own"
        shutil.copytree(getattr(tiny, kind), folder)
        named = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": named}))
        (folder / "own.py").write_text(f"import os\nos.mkdir({str(workplace / 'exploded')!r})\nclass Own: pass\n")
        return folder

    return made


def checkpoint(**hyperparameters: Any) -> str:
    instantiator = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
    content = {"state_dict": {}, "hyper_parameters": hyperparameters | instantiator}
    torch.save(content | {"pytorch-lightning_version": "2.6.0"}, "kept.ckpt")
    return "kept.ckpt"


# Hyper-parameters

KINDS = [(SFTModule, "model", "policy"), (RewardModule, "model", "reward"), (PPOModule, "policy", "policy")]


@pytest.mark.parametrize(("kind", "argument", "folder"), KINDS)
def test_checkpoint_does_not_turn_on_code_of_a_model(kind, argument, folder, own_code) -> None:
    trusted = {"path": str(own_code(folder)), "trust_remote_code": True}
    inside = {"path": trusted["path"], "peft": {"init_args": {"trust_remote_code": 1}}}
    escaped = json.dumps(trusted).replace("remote_", "remote\\u005f")
    for value in (trusted, inside, json.dumps(trusted), escaped):
        with pytest.raises(ValueError, match=f"must not run code.*{argument}=ModelSource|config in a text"):
            kind.load_from_checkpoint(checkpoint(**{argument: value}))
    assert not exploded()


def test_caller_may_turn_on_code_of_a_model(own_code) -> None:
    """The negative control: what he passes takes the place of what the checkpoint says."""
    source = {"path": str(own_code("policy")), "trust_remote_code": True}
    with pytest.raises((ValueError, AttributeError)):
        SFTModule.load_from_checkpoint(checkpoint(model=source), model=ModelSource(**source))
    assert exploded()


def test_checkpoint_of_a_run_without_code_loads_as_before(tiny) -> None:
    """Its hyper-parameters hold `trust_remote_code`, false."""
    source = {"path": str(tiny.policy), "trust_remote_code": False}
    with pytest.raises(ValueError, match="not written by SFTModule"):  # it came past the hyper-parameters
        SFTModule.load_from_checkpoint(checkpoint(model=source))


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "builtins.exec"])
def test_checkpoint_names_nothing_of_the_standard_library(name: str, tiny) -> None:
    for given in (
        {"optimizer": name},
        {"schedule": {"class_path": name, "init_args": {"args": ["mkdir", "exploded"]}}},
    ):
        with pytest.raises(ValueError, match=f"names {name} of Python's own library"):
            SFTModule.load_from_checkpoint(checkpoint(model={"path": str(tiny.policy)}, **given))
    assert not exploded()


@pytest.mark.parametrize("key", ["hparams", "module_arguments"])
def test_arguments_are_not_taken_from_where_old_lightning_kept_them(key: str, own_code) -> None:
    path = checkpoint()
    content = torch.load(path)
    torch.save(content | {key: {"model": {"path": str(own_code("policy")), "trust_remote_code": True}}}, path)
    with pytest.raises(ValueError, match=r"before 1\.0"):
        SFTModule.load_from_checkpoint(path)
    assert not exploded()


def test_arguments_are_not_read_from_another_file(tiny) -> None:
    Path("hparams.yaml").write_text("{}")
    with pytest.raises(ValueError, match="`hparams_file` is not read"):
        SFTModule.load_from_checkpoint(checkpoint(), hparams_file="hparams.yaml")


# The version of Lightning


@pytest.mark.parametrize("version", ["garbage", "1.0.0", None, "", 3])
def test_version_that_lightning_cannot_take_is_refused(version: Any, tiny, workplace) -> None:
    content = torch.load(checkpoint(model={"path": str(tiny.policy)}))
    torch.save(content | {"pytorch-lightning_version": version}, "kept.ckpt")
    with pytest.raises(ValueError, match="give a checkpoint that this library wrote"):
        SFTModule.load_from_checkpoint("kept.ckpt")
    with pytest.raises(ValueError, match="give a checkpoint that this library wrote"):
        Trainer(logger=False, accelerator="cpu").validate(
            SFTModule(ModelSource(path=str(tiny.policy))), DataLoader([0]), ckpt_path="kept.ckpt", weights_only=True
        )


# Folders


def shards(**values: Any) -> Path:
    """A folder as FSDP2 writes it."""
    folder = Path("kept.ckpt")
    shutil.rmtree(folder, ignore_errors=True)
    state = {
        "weight": torch.arange(4.0),
        "bfloat": torch.ones(2, 2, dtype=torch.bfloat16),
        "lr": 0.1,
        "betas": (0.9, 1),
    }
    dcp.save(state | values, checkpoint_id=folder, no_dist=True)
    torch.save({"epoch": 1, "rlhf": {"a": torch.ones(1)}}, folder / "meta.pt")
    return folder


def zero_files() -> Path:
    """A folder as DeepSpeed writes it."""
    scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    folder = Path("kept.ckpt")
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "latest").write_text("checkpoint")
    optimizer = {"loss_scaler": scaler.LossScaler(1.0), "zero_stage": config.ZeroStageEnum(2), "fp32": torch.ones(3)}
    torch.save({"module": {"w": torch.ones(3)}, "epoch": 1}, folder / "checkpoint" / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": optimizer}, folder / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return folder


def test_sharded_checkpoint_is_let_in(workplace: Path) -> None:
    check_folder(shards())


def test_checkpoint_of_deepspeed_is_let_in(workplace: Path) -> None:
    check_folder(zero_files())


def test_pickle_as_the_index_of_shards_does_not_run(workplace: Path) -> None:
    folder = shards()
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"\.metadata holds pickled objects \(posix\.mkdir\)"):
        check_folder(folder)
    assert not exploded()
    with pytest.raises(BaseException):  # noqa: B017, PT011  # the negative control
        dcp.load({"weight": torch.zeros(4)}, checkpoint_id=folder, no_dist=True)
    assert exploded()


def test_pickle_among_the_values_of_shards_does_not_run(workplace: Path) -> None:
    folder = shards(lr=Bomb())
    with pytest.raises(ValueError, match="distcp holds pickled objects"):
        check_folder(folder)
    assert not exploded()
    dcp.load({"lr": 0.1}, checkpoint_id=folder, no_dist=True)  # the negative control
    assert exploded()


def test_index_cannot_hide_a_value_of_shards(workplace: Path) -> None:
    """By a mapping whose `items` are none."""

    class Hiding(dict):
        def __reduce__(self) -> tuple[Any, ...]:
            from collections import OrderedDict

            return OrderedDict, (list(dict.items(self)),), {"items": OrderedDict}

    folder = shards(lr=Bomb())
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.storage_data = Hiding(index.storage_data)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="no whole index"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("new", [True, False])
def test_pickle_in_a_file_of_deepspeed_does_not_run(name: str, new: bool, workplace: Path) -> None:
    folder = zero_files()
    torch.save({"epoch": Bomb()}, folder / "checkpoint" / name, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=f"{name} (holds pickled objects|is no whole part)"):
        check_folder(folder)
    assert not exploded()


@pytest.mark.parametrize("tag", ["../elsewhere", "/tmp/elsewhere", "..", "a/b"])
def test_folder_of_deepspeed_holds_all_its_files(tag: str, workplace: Path) -> None:
    folder = zero_files()
    (folder / "latest").write_text(tag)
    with pytest.raises(ValueError, match="leads out of the folder"):
        check_folder(folder)


def test_link_to_another_folder_is_refused(workplace: Path) -> None:
    folder = zero_files()
    (workplace / "elsewhere").mkdir()
    (folder / "checkpoint" / "more").symlink_to(workplace / "elsewhere")
    with pytest.raises(ValueError, match="more leads out of the checkpoint's folder"):
        check_folder(folder)


@pytest.mark.parametrize("torn", [b"", b"\x80\x04", b"no pickle"])
def test_torn_index_is_told(torn: bytes, workplace: Path) -> None:
    folder = shards()
    (folder / ".metadata").write_bytes(torn)
    with pytest.raises(ValueError, match=r"\.metadata (is no whole index|holds pickled objects)"):
        check_folder(folder)


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
@pytest.mark.parametrize(("kind", "folder"), [(SFTModule, "policy"), (RewardModule, "reward")])
def test_trainer_looks_into_a_folder_first(verb, kind, folder, tiny, workplace, monkeypatch) -> None:
    """Also for a strategy that would load it."""
    loaded: list[Any] = []
    monkeypatch.setattr(SingleDeviceStrategy, "load_checkpoint", lambda self, path, **_: loaded.append(path) or {})
    path = shards()
    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    run = getattr(Trainer(logger=False, accelerator="cpu", max_steps=1), verb)
    with pytest.raises(ValueError, match="holds pickled objects"):
        run(kind(ModelSource(path=str(getattr(tiny, folder)))), DataLoader([0]), ckpt_path=str(path))
    assert loaded == []
    assert not exploded()


@pytest.mark.parametrize("verb", ["fit", "validate", "predict"])
def test_command_looks_into_a_folder_first(verb: str, ppo, workplace, monkeypatch, capsys) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(SingleDeviceStrategy, "load_checkpoint", lambda self, path, **_: loaded.append(path) or {})
    path = shards(lr=Bomb())
    with pytest.raises((SystemExit, ValueError)) as stopped:
        main([verb, *ppo(ckpt_path=str(path))])
    assert "holds pickled objects" in f"{stopped.value} {capsys.readouterr().err}"
    assert loaded == []
    assert not exploded()
