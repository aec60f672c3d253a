"""Hidden states that predict a response: shared prompts are read once and the last token never."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lightning_rlhf.models.cache import bare, cache_name, why_no_cache
from lightning_rlhf.models.limits import rows_of
from lightning_rlhf.models.packing import Packing, Rows, use_packing


def positions(mask: Tensor) -> Tensor:
    """Position of each token among the unmasked ones, (B, L), so that left padding shifts nothing."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def filled(tokens: Tensor, mask: Tensor) -> Tensor:
    """Replace padding by the first unmasked token of each row, (B, L).

    The embedding of a padding token may be 0; where such a position also attends to nothing, its state is 0, and norms
    have no finite gradient there, though nothing depends on it.

    Args:
        tokens: (B, L), int64.
        mask: (B, L), bool, True on real tokens.
    """
    return torch.where(mask, tokens, tokens.gather(1, mask.int().argmax(1, keepdim=True)))


@contextmanager
def casting_once(device: str) -> Iterator[None]:
    """Context in which autocast casts every weight once, instead of at each use.

    Lightning turns that cache off, because it would outlive an optimizer step; it is cleared afterwards.

    Args:
        device: type of the device.
    """
    if not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=True):
        yield
    torch.clear_autocast_cache()


def first_of_each(owner: Tensor) -> Tensor:
    """Return the first row of each group, (G,); `owner` has the groups of B rows from 0 to G - 1."""
    rows = torch.arange(len(owner), device=owner.device)
    return owner.new_full((int(owner.max()) + 1,), len(owner)).scatter_reduce(0, owner, rows, "amin")


class Backbone:
    """The transformer under a language model's head, and the arguments its forward accepts.

    Args:
        network: a causal language model, bare or in an adapter.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._accepted = set(inspect.signature(bare(network).forward).parameters)
        self._cache_name = cache_name(network) or ""
        self.shares_prompts = why_no_cache(network) is None
        """True if a prompt can be read once for several responses."""
        self.packs = False
        """True if padding is left out of every pass."""
        self._apart = False  # until packed sequences were seen not to mix

    def accepts(self, name: str) -> bool:
        """Return True if the language model's forward takes an argument of this name."""
        return name in self._accepted

    @property
    def module(self) -> nn.Module:
        """The transformer without its head."""
        return bare(self.network).base_model

    def compile(self) -> None:
        """Compile each block and stop sharing prompts, because a cache would break the graphs.

        Raises:
            ValueError: transformers does not name the network's blocks.
        """
        names = set(getattr(bare(self.network), "_no_split_modules", None) or ())
        blocks = [block for block in self.module.modules() if type(block).__name__ in names]
        if not blocks:
            raise ValueError(f"`compile`: {type(bare(self.network)).__name__} names no blocks to compile; leave it out")
        for block in blocks:
            block.compile(dynamic=True)
        self.shares_prompts = False

    def states(self, tokens: Tensor, mask: Tensor, *, width: int, groups: Tensor | None = None) -> Tensor:
        """Return hidden states from which the last `width` tokens of each row are predicted, (B, W, d).

        Args:
            tokens: (B, L), int64, padded on either side.
            mask: (B, L), bool, True on real tokens.
            width: W, 1 ≤ W < L.
            groups: (B,), int64; rows of one number have the same first L − W columns. None: nothing is known to be.
        """
        owner = None
        if groups is not None:
            prompts, owner = groups.unique(return_inverse=True)
            owner = owner if len(prompts) < len(groups) else None
        if self.packs:
            return self._packed(tokens, mask, width, owner)
        tokens = filled(tokens, mask)
        if owner is not None and self._sharing():
            return self._shared(tokens, mask, width, owner)
        return self._forward(tokens[:, :-1], mask[:, :-1], positions(mask)[:, :-1])[:, -width:]

    def all_states(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return hidden states of all tokens, (B, L, d); those of padding mean nothing.

        Args:
            tokens: (B, L), int64, padded on either side.
            mask: (B, L), bool, True on real tokens.
        """
        if self.packs:
            return self._unpadded(tokens, mask)
        return self._forward(filled(tokens, mask), mask, positions(mask))

    def _sharing(self) -> bool:
        """Return True if prompts are shared now: gradient checkpointing has no cache."""
        checkpointed = any(getattr(block, "gradient_checkpointing", False) for block in self.network.modules())
        return self.shares_prompts and not (self.network.training and checkpointed)

    def pack(self) -> None:
        """Leave padding out of every pass from now on.

        Raises:
            ValueError: the network's attention might mix sequences.
        """
        use_packing(self.network)
        self.packs = True

    @torch.no_grad()
    def _check_packing(self, device: torch.device) -> None:
        """Compare packed states with padded ones, and those of sequences beside which others have changed.

        Raises:
            ValueError: they differ.
        """
        self._apart = True
        owner = torch.tensor([0, 0, 1], device=device)
        example = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7, 15], [15, 8, 9, 10, 11, 12]], device=device)
        real = example != 15
        ids = torch.linspace(0, (rows_of(self.network) or 2) - 1, 15, device=device).long()[example.clamp(max=14)]
        packed, whole = self._packed(ids, real, 3, owner), self._packed(ids, real, 3, None)
        padded = self._forward(filled(ids, real)[:, :-1], real[:, :-1], positions(real)[:, :-1])[:, -3:]
        of_other = self._packed(torch.where(example >= 8, ids.flip(0, 1), ids), real, 3, owner)[:2]
        of_sibling = self._packed(torch.where((example >= 3) & (example <= 5), ids.flip(1), ids), real, 3, owner)[1:]
        seen = real[:, 2:-1]  # states of real tokens
        tolerance = (0.05 if padded.dtype in (torch.bfloat16, torch.float16) else 1e-3) * padded[seen].abs().max()
        near = all(bool((x - padded)[seen].abs().max() <= tolerance) for x in (packed, whole))
        apart = torch.equal(of_other[seen[:2]], packed[:2][seen[:2]])
        apart = apart and torch.equal(of_sibling[seen[1:]], packed[1:][seen[1:]])
        if not (near and apart):
            kind = type(bare(self.network)).__name__
            raise ValueError(
                f"`updates.packing` cannot be used with {kind}: "
                + (
                    "its packed states are not those of padded rows"
                    if apart
                    else "one sequence changes another's states"
                )
                + "; set it to false"
            )

    def _packed(self, tokens: Tensor, mask: Tensor, width: int, owner: Tensor | None) -> Tensor:
        """Compute the states in one pass over the real tokens; `owner` names the shared prompt of each row."""
        if owner is None:
            return self._unpadded(tokens[:, :-1], mask[:, :-1])[:, -width:]
        split, place, first = tokens.shape[1] - width, positions(mask), first_of_each(owner)
        before, after = Rows.of(mask[first, :split]), Rows.of(mask[:, split:-1])
        ids, at = (torch.cat([x[first, :split][before.real], x[:, split:-1][after.real]]) for x in (tokens, place))
        states = self._in_one_row(ids, at, Packing(first=before, then=after, owner=owner))
        prompts, responses = states.split([len(before), len(after)])
        return torch.cat([before.spread(prompts)[:, -1:][owner], after.spread(responses)], 1)

    def _unpadded(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Compute the states of whole rows in one pass over their real tokens, (B, L, d)."""
        rows = Rows.of(mask)
        return rows.spread(self._in_one_row(tokens[mask], positions(mask)[mask], Packing(first=rows)))

    def _in_one_row(self, tokens: Tensor, place: Tensor, packing: Packing) -> Tensor:
        """Compute the states of N tokens, (N, d)."""
        if not self._apart:
            self._check_packing(tokens.device)
        everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)  # `packing` says what is visible
        return self._forward(tokens[None], everything, place[None], packing=packing)[0]

    def _shared(self, tokens: Tensor, mask: Tensor, width: int, owner: Tensor) -> Tensor:
        """Compute the prompts' states in one pass, then the responses' in another that attends to the cache."""
        first = first_of_each(owner)
        split, place = tokens.shape[1] - width, positions(mask)
        cache = DynamicCache()
        cached = {self._cache_name: cache, "use_cache": True}
        with casting_once(tokens.device.type):
            before = self._forward(tokens[first, :split], mask[first, :split], place[first, :split], **cached)[:, -1:]
            if width == 1:
                return before[owner]
            cache.batch_select_indices(owner)
            inside = self._forward(tokens[:, split:-1], mask[:, :-1], place[:, split:-1], **cached)
        return torch.cat([before[owner], inside], 1)

    def _forward(self, tokens: Tensor, mask: Tensor, place: Tensor, **options: Any) -> Tensor:
        if self.accepts("position_ids"):
            options["position_ids"] = place
        output = self.module(input_ids=tokens, attention_mask=mask.long(), **({"use_cache": False} | options))
        return output.last_hidden_state
