"""What the processes hold, brought together: rows in one order whatever their number, and texts."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


def gathered(module: LightningModule, batches: list[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, Tensor] | None:
    """Columns of the rows of all processes, in the order of their places; None where nobody has a row.

    Every process must call this, with as many batches and the same columns; a batch may be empty.

    Args:
        module: whose trainer's processes.
        batches: the places of b rows, (b,), and their columns by name, (b, …) each, on the CPU.
    """
    if not batches:
        return None
    places, columns = zip(*batches, strict=True)
    order = _of_all(module, torch.cat(places)).argsort(stable=True)
    whole = {name: _of_all(module, torch.cat([batch[name] for batch in columns])) for name in columns[0]}
    return {name: column[order] for name, column in whole.items()} if len(order) else None


def gathered_text(module: LightningModule, text: str) -> str:
    """The texts of all processes end to end, that of the first process first.

    Every process must call this; its text may be empty.
    """
    written = torch.tensor(list(f"{text}\0".encode()), dtype=torch.uint8)  # never empty, which not every backend sends
    return bytes(_of_all(module, written).tolist()).decode().replace("\0", "")


def _of_all(module: LightningModule, rows: Tensor) -> Tensor:
    """The rows of all processes, those of the first process first."""
    world = module.trainer.world_size
    if world == 1:
        return rows
    counts = module.all_gather(torch.tensor(len(rows), device=module.device)).flatten().tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    whole = module.all_gather(padded.to(module.device)).cpu()
    return torch.cat([part[:count] for part, count in zip(whole, counts, strict=True)])
