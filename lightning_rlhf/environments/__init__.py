"""Environments that answer the policy during an episode."""

from lightning_rlhf.environments.environment import Done, Environment, Reply, ToolCall
from lightning_rlhf.environments.tools import ToolEnvironment

__all__ = ["Done", "Environment", "Reply", "ToolCall", "ToolEnvironment"]
