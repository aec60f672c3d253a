"""What is told of optimizers before training, and modules that leave their process."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from transformers import AutoModelForCausalLM

from lightning_rlhf.core import ConstantSchedule
from lightning_rlhf.modules import PPOModule, RewardModule, SFTModule

PROGRAM = Path(__file__).with_name("notebook_program.py")
TEXTS = [[12, 13, 20, 21, 0], [10, 11, 0]]


def nothing(prompts, responses):
    return [0.0 for _ in responses]


def test_modules_can_be_pickled_with_their_defaults(make_lm, make_scorer):
    for module in (SFTModule(make_lm()), RewardModule(make_scorer()), PPOModule(make_lm(), nothing)):
        copy = pickle.loads(pickle.dumps(module))
        one, other = (build([torch.nn.Parameter(torch.zeros(1))]) for build in (module.optimizer, copy.optimizer))
        assert type(one) is type(other) is torch.optim.AdamW
        assert one.defaults == other.defaults
        assert one.defaults["weight_decay"] == 0.0


@pytest.mark.parametrize("how", ["callback", "tuner"])
def test_learning_rate_finder_is_refused_in_a_sentence(make_lm, make_trainer, as_loader, right_padded, how):
    module = SFTModule(make_lm().double())
    trainer = make_trainer(callbacks=[LearningRateFinder()] if how == "callback" else [], enable_checkpointing=True)
    act = trainer.fit if how == "callback" else Tuner(trainer).lr_find
    with pytest.raises(ValueError, match="LearningRateFinder cannot set .*--model.optimizer.lr"):
        act(module, as_loader([right_padded(TEXTS)]))


@pytest.mark.parametrize(
    ("precision", "lr", "warned"),
    [("bf16-true", 1e-6, True), ("bf16-true", 0.1, False), ("bf16-mixed", 1e-6, False), ("32-true", 1e-6, False)],
)
def test_steps_that_round_away_are_warned_of(
    make_lm, make_trainer, as_loader, right_padded, caplog, precision, lr, warned
):
    module = SFTModule(make_lm(), optimizer=partial(torch.optim.AdamW, lr=lr), schedule=ConstantSchedule())
    with caplog.at_level(logging.WARNING, logger="lightning_rlhf"):
        make_trainer(precision=precision).fit(module, as_loader([right_padded(TEXTS)]))
    assert ("bfloat16 weights are too coarse for steps of about 1e-06" in caplog.text) == warned


@pytest.fixture(scope="module")
def notebook(tmp_path_factory, forking_python, make_lm, make_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("notebook")
    make_lm(end=list(range(10))).save_pretrained(folder / "lm")
    make_tokenizer().save_pretrained(folder / "lm")
    rows = [{"prompt": letter, "response": f"{letter} x"} for letter in "abcd"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [forking_python, str(PROGRAM), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prefix"), [("sft", "model.network."), ("ppo", "policy.network.")])
def test_export_after_a_notebook_s_strategy_has_the_trained_weights(notebook, name, prefix):
    """They were trained in other processes."""
    trained = torch.load(notebook / f"{name}.pt")
    exported = AutoModelForCausalLM.from_pretrained(notebook / name).state_dict()
    start = AutoModelForCausalLM.from_pretrained(notebook / "lm").state_dict()
    assert all(torch.equal(exported[key], trained[prefix + key]) for key in exported)
    assert any(not torch.equal(exported[key], start[key]) for key in exported)
