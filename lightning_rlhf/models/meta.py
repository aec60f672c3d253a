"""Networks on the meta device for sharding strategies, so that no process holds all weights.

Between `expect_shards` and `settle` a source that is `unread` builds its network on torch's meta device. Once the
network is sharded, each process reads its own rows of every weight (`UnreadWeights`).
"""

from __future__ import annotations

import logging
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping

from lightning_rlhf.folders.inspection import check_weights, loading
from lightning_rlhf.models.adapter import holds_adapter
from lightning_rlhf.models.source import ModelSource
from lightning_rlhf.models.stored_weights import UnreadWeights, check_unexpected, weight_files

logger = logging.getLogger(__name__)

UNREAD = "unread_weights"
"""Name of the attribute with pending weights of a network on the meta device."""
_built: ContextVar[list[nn.Module] | None] = ContextVar("built", default=None)


def expect_shards() -> None:
    """Announce that networks built from now on will be sharded before use."""
    _built.set([])


def expect_whole() -> None:
    """Announce that networks are read as they are built, also after a build that failed under `expect_shards`."""
    _built.set(None)


def settle() -> None:
    """End `expect_shards` and read the weights of networks that were not sharded."""
    for network in _built.get() or ():
        fill(network, taken(network))
    expect_whole()


def taken(network: nn.Module) -> UnreadWeights | None:
    """Detach and return the network's pending weights, which the caller must then read."""
    return network.__dict__.pop(UNREAD, None)


def fill(network: nn.Module, weights: UnreadWeights | None) -> None:
    """Read the pending weights of a network."""
    if weights is not None:
        weights.fill(network)


def unread(source: ModelSource) -> ModelSource:
    """Return the source, or one that defers its weights if shards are expected and the files allow it."""
    if _built.get() is None:
        return source
    if (reason := _why_whole(source)) is not None:
        tell_whole(source.path, reason)
        return source
    return UnreadSource(**vars(source))


def tell_whole(path: str, reason: str) -> None:
    """Log why each process reads all weights if shards are expected."""
    if _built.get() is not None:
        logger.info("each process reads all of %s before it keeps its shard: %s", path, reason)


class UnreadSource(ModelSource):
    """Source whose networks stay on the meta device until filled, except for buffers and a new head."""

    def _load(self, kind: Any, **options: Any) -> tuple[Any, list[str]]:
        place = self._place()
        if place["local_files_only"]:
            check_weights(Path(self.path))
        with loading("a model", self.path):
            network = self._structure(kind, place | options)
            weights = UnreadWeights.of(network, weight_files(self.path, **place))
        missing = weights.missing(network)
        if (reason := _why_converted(network, weights, missing)) is not None:
            tell_whole(self.path, reason)
            return super()._load(kind, **options)
        check_unexpected(network, self.path, weights.others)
        _initialize(network, missing)
        setattr(network, UNREAD, weights)
        _built.set([*(_built.get() or []), network])
        return network, missing

    def _structure(self, kind: Any, options: dict[str, Any]) -> Any:
        """Build the network on the meta device, as `from_pretrained` would build it."""
        config = AutoConfig.from_pretrained(self.path, **options)
        attention = {} if self.attention is None else {"attn_implementation": self.attention}
        with torch.device("meta"):
            network = kind.from_config(config, dtype=getattr(torch, self.dtype), **attention)
        if network.can_generate():
            with suppress(OSError):  # there is no such file: the config has said it
                network.generation_config = GenerationConfig.from_pretrained(self.path, **self._place())
        return network.eval()


def _why_whole(source: ModelSource) -> str | None:
    """Return why a source needs all weights at once."""
    if source.gguf_file is not None:
        return "GGUF weights are dequantized"
    if source.quantization is not None:
        return "weights are rounded as they are read"
    if source.peft is not None or holds_adapter(source.path):
        return "an adapter is put on whole weights"
    return "code of the model's own may expect whole weights" if source.trust_remote_code else None


def _why_converted(network: Any, weights: UnreadWeights, missing: list[str]) -> str | None:
    """Return why transformers must convert a network's weights beyond a cast."""
    config = network.config
    if getattr(config, "quantization_config", None) is not None:
        return "they are quantized"
    if network._keep_in_fp32_modules or network._keep_in_fp32_modules_strict:
        return "some of them keep another precision than the others"
    if network.state_dict().keys() != {name for name, _ in network.named_parameters(remove_duplicate=False)}:
        return "buffers lie among them"
    rules = get_model_conversion_mapping(network)
    if any(rule.rename_source_key(key)[1] is not None for rule in rules for _, key in weights.places.values()):
        return "transformers converts them as it reads them"
    other = [name for name in missing if not name.startswith("score.")]
    return weights.doubt or (f"they lie under other names: there is no {other[0]}" if other else None)


def _initialize(network: Any, missing: list[str]) -> None:
    """Compute the buffers that no file holds and draw the missing weights like `from_pretrained`."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for name, weight in list(network.named_parameters()):
        weight._is_hf_initialized = True
        if name in missing:
            owner, _, own = name.rpartition(".")
            setattr(network.get_submodule(owner), own, nn.Parameter(torch.empty_like(weight, device="cpu")))
    network.initialize_weights()
