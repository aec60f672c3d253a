"""Data modules that turn rows of text into batches of tokens."""

from lightning_rlhf.data.columns import ColumnNames
from lightning_rlhf.data.comparisons import ComparisonDataModule
from lightning_rlhf.data.demonstrations import DemonstrationDataModule
from lightning_rlhf.data.labeled import LabeledDataModule
from lightning_rlhf.data.loader import BatchSchedule, ResumableLoader
from lightning_rlhf.data.prompts import PromptDataModule
from lightning_rlhf.data.reasoning_gym import ReasoningGymRows
from lightning_rlhf.data.tables import HubData

__all__ = [
    "BatchSchedule",
    "ColumnNames",
    "ComparisonDataModule",
    "DemonstrationDataModule",
    "HubData",
    "LabeledDataModule",
    "PromptDataModule",
    "ReasoningGymRows",
    "ResumableLoader",
]
