"""Checkpoints that are torn, pickled or another's."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad_bench import Bench, Case, case
from torch import nn

from lightning_rlhf.modules import RewardModule

SFT = {"_class_path": "lightning_rlhf.SFTModule", "_instantiator": "lightning.pytorch.cli.instantiate_module"}


class Live:
    """An object that only a pickle can hold."""


def written(content: Any) -> Callable[[Bench], str]:
    """A file with those bytes, or that `torch.save` makes of another object."""

    def write(bench: Bench) -> str:
        if isinstance(content, bytes):
            return bench.file(content, "bad.ckpt")
        torch.save(content, bench.place / "bad.ckpt")
        return str(bench.place / "bad.ckpt")

    return write


def cut(bench: Bench) -> str:
    path = Path(written({"state_dict": {"x": torch.ones(1000)}})(bench))
    path.write_bytes(path.read_bytes()[:2000])
    return str(path)


def resumed(name: str, write: Callable[[Bench], str], *says: str, kind: str = "sft") -> Case:
    return case(f"resume-{name}", lambda bench: getattr(bench, kind)(f"--ckpt_path={write(bench)}"), *says)


def rewarded(name: str, write: Callable[[Bench], str], *says: str) -> Case:
    """The checkpoint as the reward of PPO."""
    return case(f"reward-{name}", lambda bench: bench.ppo(reward=write(bench)), *says)


def other_network(bench: Bench) -> str:
    """As a checkpoint of `RewardModule` on another network."""
    state = {"model.network.score.weight": torch.ones(1, 8), "model._extra_state": {"demonstration_bias": 0.0}}
    return written({"state_dict": state, "rlhf": {"model": {"path": bench.tiny.policy}}})(bench)


def from_(source: Any) -> Callable[[Bench], str]:
    """As a checkpoint of `RewardModule` that says it continues `source`."""
    return written({"state_dict": {"model._extra_state": {"demonstration_bias": 0.0}}, "rlhf": {"model": source}})


FILES = {
    "empty": (written(b""), "is no whole checkpoint"),
    "text": (written(b"hello"), "is no whole checkpoint"),
    "pickle": (written(pickle.dumps({"state_dict": {}})), "is no whole checkpoint"),
    "cut": (cut, "is no whole checkpoint"),
    "objects": (written({"state_dict": {}, "x": Live()}), "holds pickled objects"),
    "network": (written(nn.Linear(1, 1)), "holds pickled objects"),
    "list": (written([1]), "has no `state_dict`"),
    "other-keys": (written({"weights": {}}), "has no `state_dict`"),
    "no-archive": (written(b"PK\x05\x06" + bytes(18)), "is no whole checkpoint"),
}
CASES = [
    *(resumed(name, *what) for name, what in FILES.items()),
    *(rewarded(name, *what) for name, what in FILES.items()),
    resumed("missing", lambda bench: str(bench.place / "no.ckpt"), "no.ckpt"),
    resumed("pipe", lambda bench: os.mkfifo(bench.place / "x.ckpt") or f"{bench.place}/x.ckpt", "no regular file"),
    resumed("device", lambda bench: "/dev/null", "is no regular file"),
    resumed("empty-folder", lambda bench: (bench.place / "x").mkdir() or f"{bench.place}/x", "is an empty folder"),
    resumed("folder", lambda bench: str(bench.folder()), "is a folder, as strategies that shard", "trainer.strategy"),
    resumed("address", lambda bench: "nosuch://x/y.ckpt", "nothing here can read nosuch://x/y.ckpt"),
    resumed("no-name", lambda bench: "", "no path"),
    resumed(
        "other-module", written({"state_dict": {}, "hyper_parameters": SFT}), "written by SFTModule", kind="reward"
    ),
    rewarded("sft", written({"state_dict": {"model.x": torch.ones(1)}}), f"no checkpoint of a {RewardModule.__name__}"),
    rewarded("unsourced", from_(None), "is no checkpoint of a RewardModule"),
    rewarded("source-list", from_([1]), "is no checkpoint of a RewardModule"),
    rewarded("source-missing", from_({"path": "runs/sft/model"}), "there is no folder runs/sft/model"),
    rewarded("source-kernel", from_({"path": "x", "attention": "some/kernel"}), "names code of a hub"),
    rewarded("other-network", other_network, "do not fit the model"),
]
