"""Environments that answer the policy during an episode."""

from lightning_rlhf.environments.environment import Done, Environment, Reply, ToolCall
from lightning_rlhf.environments.openenv import OpenEnvironment
from lightning_rlhf.environments.reasoning_gym import ReasoningGymEnvironment
from lightning_rlhf.environments.tools import ToolEnvironment
from lightning_rlhf.environments.trl import TRLEnvironment

__all__ = [
    "Done",
    "Environment",
    "OpenEnvironment",
    "ReasoningGymEnvironment",
    "Reply",
    "TRLEnvironment",
    "ToolCall",
    "ToolEnvironment",
]
