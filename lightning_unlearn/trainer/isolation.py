"""Passes over data that leave the fit as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng as isolate_rng

from lightning_unlearn.attribution import no_batch_splitting
from lightning_unlearn.trainer.compat import is_lightning_instance
from lightning_unlearn.trainer.model_state import kept
from lightning_unlearn.trainer.progress import close_progress
from lightning_unlearn.utilities.sharding import reshard

if TYPE_CHECKING:
    from lightning_unlearn.trainer.running_fit import RunningFit


@contextmanager
def _as_in_validation(fit: RunningFit, *, switches: bool) -> Iterator[None]:
    trainer, pl_module = fit.trainer, fit.pl_module
    training = [(module, module.training) for module in pl_module.modules()]
    stage = trainer.state.stage
    try:
        if switches:
            pl_module.eval()
        trainer.validating = True
        eager = torch.compiler.set_stance("force_eager")
        with _logging_nothing(trainer, pl_module), trainer.precision_plugin.forward_context(), eager:
            yield
    finally:
        for module, flag in training:
            module.training = flag
        trainer.state.stage = stage
        close_progress(fit)


@contextmanager
def _logging_nothing(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Have ``self.log`` and the loggers, which ``forward`` may call, do nothing."""

    def ignored(*_: Any, **__: Any) -> None: ...

    logging = [module for module in pl_module.modules() if is_lightning_instance(module, "LightningModule")]
    hidden = [(module, name) for module in logging for name in ("log", "log_dict")]
    # Where somebody has put a function of their own.
    before = {(module, name): vars(module)[name] for module, name in hidden if name in vars(module)}
    loggers = trainer.loggers
    try:
        for module, name in hidden:
            vars(module)[name] = ignored
        trainer.loggers = [DummyLogger() for _ in loggers]
        yield
    finally:
        trainer.loggers = loggers
        for module, name in hidden:
            vars(module).pop(name, None)
        for (module, name), function in before.items():
            vars(module)[name] = function


@contextmanager
def isolated_eval(fit: RunningFit, *, keep: bool = True) -> Iterator[None]:
    """Run a pass over the data that leaves the fit as it was, also when it fails.

    Inside, modules are in eval mode, the Trainer reports that it validates (so that augmentation in transfer hooks is
    off), compiled modules run eagerly (their graphs ignore hooks), and nothing is logged. Random states, training
    flags, the stage and what else :func:`~lightning_unlearn.trainer.model_state.kept` names are put back. Every rank
    must enter: where the pass fails on one, it fails on all, and none waits for another for ever.

    Where FSDP2 shards the weights, ranks meet in every forward pass. There a rank that fails ends at once, and so do
    those that then wait for it in vain; and no batch is halved for want of memory, which would be one pass more.

    Args:
        fit: that is running.
        keep: False where methods of the user's are called inside that make what is to stay, such as a loader, and the
            model is not called. Modules stay in the mode that they are in then.
    """
    sharded = reshard(fit.pl_module)
    failure: BaseException | None = None
    with isolate_rng():
        try:
            with (
                kept(fit.pl_module) if keep else nullcontext(),
                # Without kept, nothing would undo what a module does to itself when it is switched to eval mode.
                _as_in_validation(fit, switches=keep),
                no_batch_splitting() if sharded else nullcontext(),
            ):
                yield
        except BaseException as error:  # isolate_rng restores only where its block ends without an exception
            failure = error
    reshard(fit.pl_module)
    if failure is not None and (sharded or not isinstance(failure, Exception)):
        raise failure
    if sharded:
        return
    failed = fit.agree(failure is not None, of_all=False)
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError("The pass over the training set failed on another rank; see its error.")
