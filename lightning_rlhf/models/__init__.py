"""Networks; this folder alone imports transformers' models."""

from lightning_rlhf.models.policy import PolicyModel
from lightning_rlhf.models.scalar import ScalarModel, score_at_end
from lightning_rlhf.models.source import ModelSource

__all__ = ["ModelSource", "PolicyModel", "ScalarModel", "score_at_end"]
