"""Decoding passes recorded as CUDA graphs, which launch all kernels of a pass at once.

A model of less than some billion weights otherwise decodes as fast as Python can launch kernels, several times slower
than the GPU could.
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
"""Function of tokens, mask, positions and cache that returns the logits of the last position."""
WORTH_RECORDING = 8
"""Number of passes from which recording pays off; it costs about two."""
AHEAD = 256
"""Number of columns for which buffers have room; then a new pass is recorded."""
_UNRECORDABLE: set[str] = set()


@contextmanager
def unplanned_attention() -> Iterator[None]:
    """Context without attention kernels that are planned anew (in 0.1 s) for each number of columns.

    cuDNN's is one, which torch prefers on recent GPUs; a decode has as many numbers of columns as passes.
    """
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def recordable(network: nn.Module) -> bool:
    """Return True if the network's passes can be recorded: on a GPU with no sliding window or earlier failure."""
    on_gpu = next(network.parameters()).device.type == "cuda"
    return on_gpu and type(network).__qualname__ not in _UNRECORDABLE and not slides(network)


def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record a step as a CUDA graph without running it and return a function that replays it.

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
    """Replayed pass that appends a token to each row, in buffers of fixed address and shape.

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
        """True if no column is left."""
        return self._used == self._mask.shape[1]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append a token to every row, (n,), int64; returns the next logits (n, V) until the next call."""
        self._tokens.copy_(tokens.unsqueeze(1))
        self._used += 1
        return self._first() if self._replay is None else self._replay()

    def grown(self) -> tuple[Cache, Tensor]:
        """Return the cache and its mask in their unrecorded form."""
        return grown_cache(self._cache, self._used), self._mask[:, : self._used]

    def _step(self) -> Tensor:
        self._mask.index_fill_(1, self._column, True)
        logits = self._forward(self._tokens, self._mask, self._mask.sum(1, keepdim=True) - 1, self._cache)
        self._column += 1
        return logits

    def _first(self) -> Tensor:
        """Run the pass, record it and compare a replay; a network that fails is never recorded again."""
        expected = self._step()
        self._column -= 1
        try:
            self._replay = record(self._step)
            logits = self._replay()
            if torch.allclose(logits.float(), expected.float(), rtol=0.05, atol=0.05 * float(expected.abs().max())):
                return logits
            reason = "a recorded pass gives other logits"
        except (RuntimeError, NotImplementedError, TypeError) as error:
            reason = str(error).splitlines()[0]
        name = type(self._network).__qualname__
        _UNRECORDABLE.add(name)
        logger.info("the passes of %s are not recorded as a CUDA graph, which would be faster: %s", name, reason)
        self._replay = self._step
        self._column.fill_(self._used - 1)
        return self._step()
