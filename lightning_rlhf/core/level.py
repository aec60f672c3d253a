"""Level of an action and its ratio: a token or the whole response (the contextual bandit)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ActionLevel(ABC):
    """Map from per-token quantities (B, R) to per-action quantities (B, T).

    The losses see (B, T) and nothing else, so the bandit is a shape and no branch.
    """

    @abstractmethod
    def mask(self, response: Tensor) -> Tensor:
        """Mask of the actions that count, (B, T), bool.

        Args:
            response: tokens the policy chose, (B, R), bool.
        """

    @abstractmethod
    def total(self, x: Tensor, response: Tensor) -> Tensor:
        """Sum an additive quantity (log-probs, KL) over each action, (B, T).

        Args:
            x: per token, (B, R).
            response: (B, R), bool.
        """

    @abstractmethod
    def state_value(self, values: Tensor, response: Tensor) -> Tensor:
        """Value V of the state in which each action is chosen, (B, T).

        Args:
            values: V before each token, (B, R), reward units.
            response: (B, R), bool.
        """

    def spread(self, x: Tensor, response: Tensor) -> Tensor:
        """Divide a quantity of each action equally over its tokens, (B, R): `total` undoes it.

        Args:
            x: per action, (B, T).
            response: (B, R), bool.
        """
        actions, tokens = self.mask(response), response.sum(1, keepdim=True).clamp(min=1)
        return torch.where(response, x * actions.sum(1, keepdim=True) / tokens, torch.zeros_like(x[:, :1]))

    def log_ratio(self, logprobs: Tensor, old_logprobs: Tensor, response: Tensor) -> Tensor:
        """log π_θ(a|s) − log π_old(a|s) of each action, (B, T), nats.

        Args:
            logprobs: log π_θ per token, (B, R), nats.
            old_logprobs: log π_old per token, (B, R), nats.
            response: (B, R), bool.
        """
        return self.total(logprobs - old_logprobs, response)


@dataclass(frozen=True, kw_only=True)
class TokenLevel(ActionLevel):
    """One action per token, T = R: the Markov decision process of token-level PPO."""

    def mask(self, response: Tensor) -> Tensor:
        """Mask of the response's tokens."""
        return response

    def total(self, x: Tensor, response: Tensor) -> Tensor:
        """Return `x` with 0 outside the response."""
        return torch.where(response, x, torch.zeros_like(x))

    def state_value(self, values: Tensor, response: Tensor) -> Tensor:
        """Value V before each token; 0 outside the response."""
        return torch.where(response, values, torch.zeros_like(values))


@dataclass(frozen=True, kw_only=True)
class SequenceLevel(ActionLevel):
    """One action per response, T = 1: the contextual bandit (Ouyang et al. 2022, §3.5).

    log π(y|x) = Σ_t log π(y_t | x, y_<t)
    """

    def mask(self, response: Tensor) -> Tensor:
        """Mask, (B, 1), that is True for every response of at least one token."""
        return response.any(1, keepdim=True)

    def total(self, x: Tensor, response: Tensor) -> Tensor:
        """Sum Σ_t x over the response, (B, 1)."""
        return torch.where(response, x, torch.zeros_like(x)).sum(1, keepdim=True)

    def state_value(self, values: Tensor, response: Tensor) -> Tensor:
        """Value V at the prompt's last token, (B, 1), before the response."""
        return values[:, :1]


@dataclass(frozen=True, kw_only=True)
class SpanLevel(ActionLevel):
    """One action per span of a dialogue with an environment: a turn, T = R.

    A span is what the policy wrote without interruption, and its action stands at its last token. A response without
    interruption is one action, as under `SequenceLevel`.
    """

    def mask(self, response: Tensor) -> Tensor:
        """Mask that is True at the last token of each span."""
        follows = torch.cat([response[:, 1:], torch.zeros_like(response[:, :1])], 1)
        return response & ~follows

    def total(self, x: Tensor, response: Tensor) -> Tensor:
        """Sum Σ_t x over each span, at its last token."""
        span = _span_numbers(response)
        sums = x.new_zeros(len(x), x.shape[1] + 1).scatter_add(1, span, torch.where(response, x, torch.zeros_like(x)))
        return torch.where(self.mask(response), sums.gather(1, span), torch.zeros_like(sums[:, :1]))

    def state_value(self, values: Tensor, response: Tensor) -> Tensor:
        """Value V before the first token of each span, at its last token."""
        before = torch.cat([torch.zeros_like(response[:, :1]), response[:, :-1]], 1)
        opening = torch.where(response & ~before, values, torch.zeros_like(values))
        return self.total(opening, response)

    def spread(self, x: Tensor, response: Tensor) -> Tensor:
        """Divide a quantity of each action equally over the tokens of its span, (B, R)."""
        span = _span_numbers(response)
        empty = x.new_zeros(len(x), x.shape[1] + 1)
        sizes = empty.scatter_add(1, span, response.to(x.dtype)).clamp(min=1)
        share = empty.scatter_add(1, span, torch.where(self.mask(response), x, torch.zeros_like(x))) / sizes
        return torch.where(response, share.gather(1, span), torch.zeros_like(x))


def _span_numbers(response: Tensor) -> Tensor:
    """Number the spans of each row from 1, (B, R).

    A token between two spans has the number of the one before.
    """
    before = torch.cat([torch.zeros_like(response[:, :1]), response[:, :-1]], 1)
    return (response & ~before).long().cumsum(1)


@dataclass(frozen=True, kw_only=True)
class GeometricLevel(SequenceLevel):
    """Whole response with its ratio normalized by its length (GSPO; Zheng et al. 2025, eq. 7).

    log s = (1/|y|) Σ_t log π_θ(y_t)/π_old(y_t): the geometric mean of the token ratios. Rewards and KL stay those of
    the whole response. The ratio moves far less than a token's, so the paper clips at 3e-4 below and 4e-4 above.
    At π_old its gradient is that of `SeqMeanTokenMean` over tokens, and so not ∇J where lengths vary.
    """

    def log_ratio(self, logprobs: Tensor, old_logprobs: Tensor, response: Tensor) -> Tensor:
        """Average the log-ratio over the response's tokens, (B, 1), nats per token."""
        return self.total(logprobs - old_logprobs, response) / response.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class GeometricTokenLevel(TokenLevel):
    """Tokens that all have the length-normalized ratio of their response (LUSPO, 2602.05261).

    One loss for all tokens of a response is that loss times its length in a sum over tokens: with `SeqMeanTokenSum` it
    is LUSPO, with `SeqMeanTokenMean` GSPO. At π_old the gradient of the sum is that of `TokenLevel`, so that it is ∇J
    where `GeometricLevel` divides each response's by its length.
    """

    def log_ratio(self, logprobs: Tensor, old_logprobs: Tensor, response: Tensor) -> Tensor:
        """Average the log-ratio over the response's tokens, (B, R), nats per token; 0 outside the response."""
        mean = GeometricLevel().log_ratio(logprobs, old_logprobs, response)
        return torch.where(response, mean, torch.zeros_like(mean))
