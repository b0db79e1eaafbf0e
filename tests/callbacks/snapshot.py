"""All of a fit that a callback could leave behind, taken down to be compared."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# What changes from use to use of a loader: its iterator.
OF_USE = {"_iterator", "_DataLoader__multiprocessing_context"}


def random_states() -> dict[str, Any]:
    return {
        "torch": torch.random.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002 (the global one is meant)
        "python": random.getstate(),
    }


def of_modules(module: nn.Module) -> dict[str, Any]:
    """Hooks, modes, flags, and what the instances themselves define."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        found[f"{name} hooks"] = {kind: len(getattr(part, kind)) for kind in HOOKS}
        found[f"{name} training"] = part.training
        found[f"{name} attributes"] = sorted(part.__dict__)
    for name, parameter in module.named_parameters():
        found[f"{name} requires_grad"] = parameter.requires_grad
        found[f"{name} hooks"] = len(parameter._backward_hooks or {})
    return found


def of_loader(loader: Any) -> dict[str, Any]:
    """Which objects it is made of."""
    return {
        "loader": {key: id(value) for key, value in loader.__dict__.items() if key not in OF_USE},
        "batch sampler": {key: id(value) for key, value in loader.batch_sampler.__dict__.items()},
        "dataset": sorted(loader.dataset.__dict__),
    }


def of_trainer(trainer: Any, leave_out: Iterable[Any] = ()) -> dict[str, Any]:
    """Settings, callbacks, and what the loops themselves define.

    Args:
        trainer: after a fit.
        leave_out: callbacks.
    """
    loop = trainer.fit_loop
    left_out = [id(callback) for callback in leave_out]
    return {
        "callbacks": [type(callback).__name__ for callback in trainer.callbacks if id(callback) not in left_out],
        "val_check_interval": trainer.val_check_interval,
        "limits": (trainer.limit_train_batches, trainer.limit_val_batches),
        "max_epochs": loop.max_epochs,
        "status": (trainer.state.fn, trainer.state.status, trainer.state.stage),
        "fit loop": sorted(loop.__dict__),
        "epoch loop": sorted(loop.epoch_loop.__dict__),
        "data source": sorted(loop._data_source.__dict__),
        "optimizer hooks": [
            (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks))
            for optimizer in trainer.optimizers
        ],
    }


def of_optimizers(trainer: Any) -> list[Any]:
    """Class, settings, parameters and state."""
    return [
        {
            "class": type(optimizer).__name__,
            "groups": [{**group, "params": len(group["params"])} for group in optimizer.param_groups],
            "state": optimizer.state_dict()["state"],
            "schedules": [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs],
        }
        for optimizer in trainer.optimizers
    ]


def of_process() -> dict[str, Any]:
    """Switches of torch."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "stance": torch._dynamo.eval_frame._stance.stance,
        "dtype": torch.get_default_dtype(),
    }


def assert_same(one: Any, other: Any, at: str = "") -> None:
    """Equal, tensors bit for bit."""
    assert type(one) is type(other), at
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=at)
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            assert_same(one[key], other[key], f"{at}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), at
        for position, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{at}[{position}]")
    else:
        assert one == other, at
