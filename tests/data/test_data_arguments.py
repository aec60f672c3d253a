from __future__ import annotations

from typing import Any

import pytest

from lightning_rlhf.data import ComparisonDataModule, DemonstrationDataModule, PromptDataModule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "`eval_batch_size` must be at least 1, got 0"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"num_workers": 1025}, "`num_workers` must be at most 1024, got 1025"),
        ({"batch_size": 2**20 + 1}, "`batch_size` must be at most 1048576, got 1048577"),
        ({"max_prompt_tokens": 0}, "`max_prompt_tokens` must be at least 1"),
        ({"text_tokens": 1}, "`text_tokens` must be at least 2, got 1"),
        ({"pretrain_ratio": 0.0}, "`pretrain_ratio` must be"),
    ],
)
def test_bad_prompt_argument_is_explained(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptDataModule("x", **arguments)


@pytest.mark.parametrize("kind", [ComparisonDataModule, DemonstrationDataModule])
@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size", "max_tokens"])
def test_bad_text_argument_is_explained(kind: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be at least"):
        kind("x", **{name: 0})
