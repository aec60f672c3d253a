"""Each published method trains from a folder, a function and its name."""

from __future__ import annotations

import pytest

from lightning_rlhf import PPOModule, PromptDataModule, SamplingParams
from lightning_rlhf.core import (
    DAPO,
    GRPO,
    GSPO,
    LUSPO,
    RLOO,
    TLDR,
    Algorithm,
    CISPOMethod,
    DrGRPO,
    InstructGPT,
    ReinforcePP,
    SAPOMethod,
    VESPOMethod,
)

COMPARING = (RLOO, GRPO, DrGRPO, DAPO, GSPO, CISPOMethod, LUSPO, SAPOMethod, VESPOMethod)
ALONE = (Algorithm, InstructGPT, TLDR, ReinforcePP)


def brevity(prompts: list[str], responses: list[str]) -> list[float]:
    return [-len(response) / 100 for response in responses]


@pytest.mark.parametrize("method", [*ALONE, *COMPARING])
def test_method_trains_by_its_name(make_folder, make_trainer, write_rows, method):
    folder = make_folder()
    files = {
        "train": write_rows("prompts.jsonl", [{"prompt": letter} for letter in "abcd"]),
        "pretrain": write_rows("texts.jsonl", [{"text": "a b c d e f"}] * 8) if method is InstructGPT else None,
    }
    module = PPOModule(policy=folder, reward=brevity, algorithm=method(), generation=SamplingParams(max_new_tokens=3))
    make_trainer(max_epochs=1).fit(module, PromptDataModule(**files, batch_size=4, pretrain_ratio=1.0, text_tokens=6))
    assert module.iteration == 1
    assert module.episodes == 4 * (8 if method in COMPARING else 1)
    assert (module.value is None) == (method not in (InstructGPT, TLDR))
    assert module.algorithm.kl.coef == method().kl.coef
    assert not module.algorithm.rules or method is DAPO  # a function's scale is unknown


def test_learning_rate_is_set_once(make_lm, make_trainer, as_loader, left_padded):
    module = PPOModule(make_lm(), lambda prompts, responses: [0.0], lr=3e-4)
    assert module.optimizer([{"params": list(make_lm().parameters())}]).param_groups[0]["lr"] == 3e-4
    with pytest.raises(ValueError, match="`lr`=0.1 is of the default optimizer: give it to `optimizer` instead"):
        PPOModule(make_lm(), lambda prompts, responses: [0.0], lr=0.1, optimizer=module.optimizer)
