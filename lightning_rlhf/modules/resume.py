"""Settings that a checkpoint keeps and their agreement with those of the run that resumes it."""

from __future__ import annotations

import hashlib
from importlib import metadata
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import Tensor, nn

from lightning_rlhf.core.checks import check_not_negative
from lightning_rlhf.core.settings import Difference, accept_differences, described
from lightning_rlhf.models.adapter import is_adapted, sampled
from lightning_rlhf.rewards import Reward

FREE = ("microbatch", "microbatch_tokens", "packing", "slots", "gradient_checkpointing")
"""Settings that change memory and speed, never the result."""
MODELS = ("policy", "reference", "value", "reward", "model", "weights", "reference_dtype")
"""Settings that a resumed run must not change, because they decide its past."""


def version() -> str:
    """Version of this library, for a checkpoint to name."""
    try:
        return metadata.version("lightning-rlhf")
    except metadata.PackageNotFoundError:
        return "unknown"


def reward_settings(reward: Reward) -> dict[str, Any]:
    """Describe a reward in plain values: its class with its identity, or the name of a function."""
    values: dict[str, Any] = described(reward)
    return values


def settings(optimizer: OptimizerCallable, **arguments: Any) -> dict[str, Any]:
    """Describe a module's arguments in plain values, without those that are free to change.

    Args:
        optimizer: a function of the parameters.
        arguments: those that must agree, by name, as they are before training moves any. A `policy` that is already
            built is where the reference comes from, so that its weights must agree as well.

    Raises:
        ValueError: the learning rate is no number.
    """
    values: dict[str, Any] = described(arguments)
    policy = arguments.get("policy")
    if isinstance(policy, nn.Module):
        values["policy"] = {"class": type(policy).__qualname__, "weights at the start": weights_digest(policy)}
    for value in values.values():
        for name in FREE if isinstance(value, dict) else ():
            value.pop(name, None)
    example = optimizer([{"params": [nn.Parameter(torch.zeros(1, 1))]}])
    if "lr" in example.defaults:
        check_not_negative(lr=float(example.defaults["lr"]))  # torch itself takes infinity
    return values | {"optimizer": {"class": type(example).__qualname__} | described(example.defaults)}


def of_all_processes(settings: dict[str, Any], trainer: Trainer | None) -> dict[str, Any]:
    """Multiply the minibatch by the number of processes, so that runs on other numbers compare equal.

    Args:
        settings: of a module.
        trainer: whose processes; None counts one.
    """
    world = 1 if trainer is None else trainer.world_size
    updates = dict(settings["updates"])
    minibatch = updates.pop("minibatch")
    return settings | {"updates": updates | {"minibatch of all processes": minibatch and minibatch * world}}


def saved(module: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint of the RL stage holds beside the weights: counters, settings and what has adapted.

    All processes must call this.

    Args:
        module: of the RL stage.
        settings: its arguments as plain values.
    """
    return {
        "iteration": module.iteration,
        "episodes": module.episodes,
        "version": version(),
        "settings": of_all_processes(settings, module._trainer),
        "algorithm": module.algorithm.state(),
        "selection": module.selection.state(),
        "ahead": module.collector.sampler.ahead.state() if module.responder else {},
        "reference": module.collector.reference.state() if module.responder else {},
    }


def restored(
    module: Any, checkpoint: dict[str, Any], settings: dict[str, Any]
) -> tuple[list[Difference], dict[str, Any]]:
    """Restore what `saved` kept to a module of the RL stage.

    Args:
        module: of the RL stage.
        checkpoint: as loaded.
        settings: the module's arguments as plain values.

    Returns:
        the settings that changed, and the state of the rollout drawn ahead.

    Raises:
        ValueError: as of `check_resumable`.
    """
    changed = check_resumable(module, checkpoint, of_all_processes(settings, module._trainer))
    state = with_changes(checkpoint["rlhf"], changed)
    module.iteration, module.episodes = state["iteration"], state["episodes"]
    module.algorithm = module.algorithm.restored(state["algorithm"])
    module.selection.restore(state.get("selection", {}))
    if state.get("reference"):
        module.configure_model()
        module.reference.restore(state["reference"])
    return changed, state.get("ahead", {})


def check_resumable(module: LightningModule, checkpoint: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """Raise if a checkpoint cannot be resumed with these settings, and return the settings that changed.

    A run can go on with other numbers, such as a learning rate, β or a limit on lengths, which a warning lists. It
    cannot with other models, classes or shapes.

    Args:
        module: about to load it.
        checkpoint: as loaded.
        now: the module's `settings`.

    Raises:
        ValueError: it is of another module; or settings, names or shapes of parameters differ, and all differences are
            listed.
    """
    state = checkpoint.get("state_dict")  # None if each process has shards
    _check_kind(module, checkpoint, state)
    trainer = module._trainer
    if trainer is None or trainer.state.fn != "fit":
        return []
    before, today = dict(checkpoint["rlhf"]["settings"]), dict(now)
    if state is not None and not trainer.strategy.restore_checkpoint_after_setup:  # else the module holds shards by now
        before["weights"], today["weights"] = _shapes(state), _shapes(module.state_dict())
    return accept_differences(
        before,
        today,
        of="configuration or model",
        is_future=lambda difference: difference.is_number and difference.name.partition(".")[0] not in MODELS,
        writer=checkpoint["rlhf"].get("version"),
    )


def with_changes(state: dict[str, Any], changed: list[Difference]) -> dict[str, Any]:
    """Replace a checkpoint's adaptive numbers by today's if their start was changed.

    Args:
        state: numbers by name of the setting, then of the field.
        changed: what `check_resumable` returned.
    """
    now = {difference.name: difference.now for difference in changed}
    return {
        name: {field: now.get(f"{name}.{field}", number) for field, number in numbers.items()}
        if isinstance(numbers, dict)
        else numbers
        for name, numbers in state.items()
    }


def _check_kind(module: LightningModule, checkpoint: dict[str, Any], state: dict[str, Any] | None) -> None:
    networks = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    stored = networks if state is None else {name.partition(".")[0] for name in state}
    record: Any = checkpoint.get("rlhf")
    ours = isinstance(record, dict) and isinstance(record.get("settings"), dict)
    writer = record.get("module") if ours else None  # None if the networks' names tell
    if ours and not networks - stored and writer in (None, *(kind.__name__ for kind in type(module).__mro__)):
        return
    reader = type(module).__name__
    raise ValueError(
        f"the checkpoint was {f'written by {writer}, not by' if writer else 'not written by'} {reader}, which holds "
        f"{_list(networks)}: it holds {_list(stored)}; give a checkpoint of {reader}, or hand a model on as the folder "
        "that `save_pretrained` writes"
    )


def _list(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)[:5]) or "no weights"


def _shapes(state: dict[str, Any]) -> dict[str, str]:
    return {name: str(list(value.shape)) for name, value in state.items() if isinstance(value, Tensor)}


def keep_hyperparameters(module: LightningModule, **arguments: Any) -> None:
    """Save the CLI's config or else the arguments that are plain values as hyperparameters.

    Because live objects would be pickled, a checkpoint with them does not load under `weights_only=True`.

    Args:
        module: whose `hparams`.
        arguments: of its constructor, by name.
    """
    if _given_hyperparameters.get() is not None:
        module.save_hyperparameters()
    else:
        module.save_hyperparameters({name: value for name, value in arguments.items() if _is_plain(value)})


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


@torch.no_grad()
def weights_digest(network: nn.Module) -> str:
    """Return a digest of up to 64 numbers of each parameter; for an adapted network, of its base.

    Those of the base are what the reference of the RL stage is made of, and training an adapter leaves them as they
    are.
    """
    digest, adapted = hashlib.sha256(), is_adapted(network)
    for name, weight in network.named_parameters():
        if weight.is_meta or (adapted and weight.requires_grad):
            continue
        digest.update(name.encode() + sampled(weight).double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
