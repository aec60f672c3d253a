"""Open responses with their cache, right-aligned so that rows of any age decode together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from lightning_rlhf.engines.cuda_graph import WORTH_RECORDING, RecordedPass, recordable, unplanned_attention
from lightning_rlhf.models.backbone import Backbone, positions
from lightning_rlhf.models.cache import cache_name, growing_cache


class Slots:
    """Rows in the process of decoding.

    Every row's newest token is in the last column; columns that a row lacks on the left are masked. On a GPU a pass is
    recorded once the rows are settled, and rows and columns then stay until they change again.

    Args:
        network: a causal language model whose cache can be cut (`why_no_cache`).

    Attributes:
        rows: which response each slot holds, (n,), int64.
        ages: tokens it has already, (n,), int64.
        open: whether it goes on, (n,), bool; a closed row keeps its slot until `drop_closed`.
        logits: of its next token, (n, V).
        mask: its real columns, (n, C), bool.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.backbone = Backbone(network)
        self._cache_name = cache_name(network) or ""
        device = next(network.parameters()).device
        self.rows = self.ages = torch.empty(0, dtype=torch.long, device=device)
        self.open = torch.empty(0, dtype=torch.bool, device=device)
        self.mask = torch.empty(0, 0, dtype=torch.bool, device=device)
        self.logits = torch.empty(0, device=device)
        self.cache: Any = None
        self.recorded: RecordedPass | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def admit(self, rows: Tensor, tokens: Tensor, mask: Tensor, *, samples: int) -> None:
        """Read prompts and open `samples` rows for each.

        Args:
            rows: the responses they begin, (m·samples,), int64.
            tokens: prompts, (m, P), int64, padded on the left.
            mask: (m, P), bool.
            samples: responses to each prompt.
        """
        self._let_go()
        first = int(mask.any(0).int().argmax())
        tokens = tokens[:, first:]
        mask = mask[:, first:]
        cache = growing_cache()
        logits = self._forward(tokens, mask, positions(mask), cache)
        if samples > 1:
            cache.batch_repeat_interleave(samples)
            logits, mask = logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
        if len(self):
            self._join(cache, mask)
            logits = torch.cat([self.logits, logits])
        else:
            self.cache, self.mask = cache, mask
        self.logits = logits
        self.rows, self.ages = torch.cat([self.rows, rows]), torch.cat([self.ages, torch.zeros_like(rows)])
        self.open = torch.cat([self.open, torch.ones_like(rows, dtype=torch.bool)])

    def advance(self, tokens: Tensor, *, passes: int = 0) -> None:
        """Append a token to every row, (n,), int64.

        Args:
            tokens: of closed rows, any.
            passes: to come over these rows, at most; 0 where rows may still be admitted.
        """
        self.ages = self.ages + 1
        if self.recorded is not None and self.recorded.full:
            self._let_go()
        if self.recorded is None and passes >= WORTH_RECORDING and recordable(self.network):
            self.recorded = RecordedPass(self.network, self._forward, self.cache, self.mask, passes=passes)
        if self.recorded is not None:
            self.logits = self.recorded(tokens)
            return
        self.mask = pad(self.mask, (0, 1), value=True)
        self.logits = self._forward(tokens.unsqueeze(1), self.mask, self.mask.sum(1, keepdim=True) - 1, self.cache)

    def drop_closed(self) -> None:
        """Drop the closed rows and the columns that only they used."""
        self._let_go()
        index = self.open.nonzero().squeeze(1)
        self.rows, self.ages, self.open, self.mask = (x[index] for x in (self.rows, self.ages, self.open, self.mask))
        if not len(index):
            self.cache, self.logits = None, torch.empty(0)
            return
        first = int(self.mask.any(0).int().argmax())
        self.mask = self.mask[:, first:]
        for layer in self.cache.layers:
            layer.keys, layer.values = (x[index, :, first:] for x in (layer.keys, layer.values))

    def _let_go(self) -> None:
        """Discard the recorded pass, because the rows are about to change."""
        if self.recorded is not None:
            self.cache, self.mask = self.recorded.grown()
            self.logits, self.recorded = self.logits.clone(), None  # they lay in what was recorded

    def _join(self, cache: Any, mask: Tensor) -> None:
        """Append rows below the present ones, all right-aligned."""
        width = max(mask.shape[1], self.mask.shape[1])
        self.mask = torch.cat([pad(m, (width - m.shape[1], 0)) for m in (self.mask, mask)])
        for layer, other in zip(self.cache.layers, cache.layers, strict=True):
            pairs = (layer.keys, other.keys), (layer.values, other.values)
            layer.keys, layer.values = (
                torch.cat([pad(x, (0, 0, width - x.shape[2], 0)) for x in pair]) for pair in pairs
            )

    def _forward(self, tokens: Tensor, mask: Tensor, place: Tensor, cache: Cache) -> Tensor:
        """Return the logits of the last position, (n, V)."""
        options: dict[str, Any] = {self._cache_name: cache, "use_cache": True}
        if self.backbone.accepts("position_ids"):
            options["position_ids"] = place
        if self.backbone.accepts("logits_to_keep"):
            options["logits_to_keep"] = 1
        with unplanned_attention():
            return self.network(input_ids=tokens, attention_mask=mask.long(), **options).logits[:, -1]
