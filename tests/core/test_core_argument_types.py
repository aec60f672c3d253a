"""A class, a name or a number where an object is needed is refused where it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import pytest
import torch

from lightning_rlhf import (
    GRPO,
    Algorithm,
    PPOModule,
    PreferenceModule,
    RewardModule,
    SamplingParams,
    SFTModule,
    UpdateSchedule,
    WinRate,
)
from lightning_rlhf.core import (
    DPO,
    K3,
    Centered,
    Clip,
    ConstantSchedule,
    GroupAdvantage,
    GroupStd,
    KLInLoss,
    RankingLoss,
    TokenLevel,
    TruncatedIS,
    Whitened,
)
from lightning_rlhf.core.arguments import check_arguments


def length(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def ppo(**options: Any) -> PPOModule:
    return PPOModule(torch.nn.Linear(1, 1), length, **options)


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "class as part": (lambda: Algorithm(advantage=GroupAdvantage), r"`advantage`.* write GroupAdvantage\(\)"),
    "name as part": (lambda: GRPO(surrogate="Clip"), "`surrogate` must be Surrogate: got the text 'Clip'"),
    "text as number": (lambda: Algorithm(beta="0.1"), "`beta` must be float or KLController"),
    "bool as number": (lambda: Algorithm(ptx_coef=True), "`ptx_coef` must be float"),
    "class as level": (lambda: Algorithm(level=TokenLevel), r"write TokenLevel\(\)"),
    "class in a part": (lambda: GroupAdvantage(scale=GroupStd), r"`scale`.* write GroupStd\(\)"),
    "class as estimator": (lambda: KLInLoss(estimator=K3), r"`estimator`.* write K3\(\)"),
    "class inside Whitened": (lambda: Whitened(estimator=GroupAdvantage), "`estimator`"),
    "class inside TruncatedIS": (lambda: TruncatedIS(surrogate=Clip), "`surrogate`"),
    "class inside Centered": (lambda: Centered(loss=RankingLoss), "`loss`"),
    "text as count": (lambda: SamplingParams(max_new_tokens="8"), "`max_new_tokens` must be int"),
    "dtype of torch": (lambda: SamplingParams(dtype=torch.bfloat16), "`dtype` must be 'bfloat16' or"),
    "text as size": (lambda: UpdateSchedule(minibatch="8"), "`minibatch` must be int or None"),
    "mapping as object": (lambda: ppo(generation={"max_new_tokens": 4}), "`generation` must be SamplingParams"),
    "name of method": (lambda: ppo(algorithm="GRPO"), "`algorithm` must be Algorithm or None"),
    "class of method": (lambda: ppo(algorithm=GRPO), r"write GRPO\(\)"),
    "class of schedule": (lambda: ppo(schedule=ConstantSchedule), r"write ConstantSchedule\(\)"),
    "one evaluation": (lambda: ppo(evaluations=WinRate()), "`evaluations` must be a list of Evaluator"),
    "class of evaluation": (lambda: ppo(evaluations=[WinRate]), "`evaluations`"),
    "built optimizer": (lambda: ppo(optimizer=torch.optim.SGD([torch.zeros(1)])), "`optimizer` must be a function"),
    "no policy": (lambda: PPOModule(None, length), "`policy` must be ModelSource or str or Module"),
    "no model": (lambda: SFTModule(None), "`model`"),
    "class of direct loss": (lambda: PreferenceModule(torch.nn.Linear(1, 1), loss=DPO), r"write DPO\(\)"),
    "loss of a reward model": (lambda: PreferenceModule(torch.nn.Linear(1, 1), loss=RankingLoss()), "`loss`"),
    "class of loss": (lambda: RewardModule(torch.nn.Linear(1, 1), loss=RankingLoss), r"write RankingLoss\(\)"),
}


@pytest.mark.parametrize(("build", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_refused_where_it_is_made(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build()


class Anything:
    """Arguments of every kind of annotation that the library has."""

    def __init__(
        self, number: float = 0, names: Sequence[str] = (), kind: Literal["a", "b"] = "a", fn: Callable | None = None
    ) -> None:
        pass


@pytest.mark.parametrize(
    "values", [{"number": 3}, {"names": ["a"]}, {"names": ("a", "b")}, {"kind": "b"}, {"fn": len}, {"other": object()}]
)
def test_fitting_argument_is_taken(values: dict[str, Any]) -> None:
    check_arguments(Anything, values)


@pytest.mark.parametrize("values", [{"number": "3"}, {"names": "ab"}, {"names": [1]}, {"kind": "c"}, {"fn": 3}])
def test_other_argument_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(values))):
        check_arguments(Anything, values)


def test_optimizer_without_a_learning_rate_is_told(caplog: pytest.LogCaptureFixture) -> None:
    ppo(optimizer=partial(torch.optim.AdamW, lr=1e-6))
    assert "learning rate" not in caplog.text
    ppo(optimizer=torch.optim.AdamW)
    assert "its own default learning rate, 0.001" in caplog.text
