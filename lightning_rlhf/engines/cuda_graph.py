"""A pass over fixed buffers, recorded as a CUDA graph: a GPU gets its thousand small kernels by one launch.

A model of less than some billion weights decodes as fast as Python can launch kernels, several times slower than the
GPU could.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from lightning_rlhf.models.cache import fixed_cache, grown_cache, slides

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor, Tensor, Tensor, Cache], Tensor]
"""From tokens, mask, positions and cache to the logits of the last position."""
WORTH_RECORDING = 8
"""Passes from which on it pays to record one, which costs about two."""
AHEAD = 256
"""Columns for which buffers have room; then a new pass is recorded."""
_UNRECORDABLE: set[str] = set()


@contextmanager
def unplanned_attention() -> Iterator[None]:
    """Inside it attention runs in no kernel that is planned anew, in a tenth of a second, for every number of columns.

    cuDNN's is one, which torch prefers on recent GPUs; a decode has as many numbers of columns as passes.
    """
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def recordable(network: nn.Module) -> bool:
    """Whether a pass of the network may be recorded: on a GPU, with no window that slides, and if it never failed."""
    on_gpu = next(network.parameters()).device.type == "cuda"
    return on_gpu and type(network).__qualname__ not in _UNRECORDABLE and not slides(network)


def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What does the step again in one launch, over the same memory; the step is not done here.

    Raises:
        RuntimeError: the step waits for the GPU, or does something else that cannot be recorded.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # not `torch.cuda.graph`, which empties the cache of memory that training will want
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            output = step()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class RecordedPass:
    """A token for each of the same rows, pass by pass, in buffers whose place and shape never change.

    Args:
        network: a causal language model that is `recordable`.
        forward: its pass.
        cache: of the rows so far, C columns.
        mask: real columns, (n, C), bool.
        passes: to come, at most.
    """

    def __init__(self, network: nn.Module, forward: Forward, cache: Cache, mask: Tensor, *, passes: int) -> None:
        rows, self._used = mask.shape
        width = self._used + min(passes, AHEAD)
        width += -width % 8  # kernels want aligned masks
        self._network, self._forward = network, forward
        self._column = torch.tensor([self._used], device=mask.device)
        self._tokens = torch.zeros(rows, 1, dtype=torch.long, device=mask.device)
        self._mask = pad(mask, (0, width - self._used))
        self._cache = fixed_cache(cache, self._column, width)
        self._replay: Callable[[], Tensor] | None = None

    @property
    def full(self) -> bool:
        """Whether there is no column left."""
        return self._used == self._mask.shape[1]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append a token to every row, (n,), int64: the logits of the next ones, (n, V), until the next call."""
        self._tokens.copy_(tokens.unsqueeze(1))
        self._used += 1
        return self._first() if self._replay is None else self._replay()

    def grown(self) -> tuple[Cache, Tensor]:
        """The cache, and its mask, as they would be without recording."""
        return grown_cache(self._cache, self._used), self._mask[:, : self._used]

    def _step(self) -> Tensor:
        self._mask.index_fill_(1, self._column, True)
        logits = self._forward(self._tokens, self._mask, self._mask.sum(1, keepdim=True) - 1, self._cache)
        self._column += 1
        return logits

    def _first(self) -> Tensor:
        """The pass as it is, recorded, and done again to compare; a network that fails is not recorded any more."""
        expected = self._step()
        self._column -= 1
        try:
            self._replay = record(self._step)
            found = self._replay()
            if torch.allclose(found.float(), expected.float(), rtol=0.05, atol=0.05 * float(expected.abs().max())):
                return found
            reason = "a recorded pass gives other logits"
        except (RuntimeError, NotImplementedError, TypeError) as error:
            reason = str(error).splitlines()[0]
        name = type(self._network).__qualname__
        _UNRECORDABLE.add(name)
        logger.info("the passes of %s are not recorded as a CUDA graph, which would be faster: %s", name, reason)
        self._replay = self._step
        self._column.fill_(self._used - 1)
        return self._step()
