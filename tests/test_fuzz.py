"""Random fits either work, with everything that they promise, or are refused in a sentence that says what to do.

A failing test's name ends in its seed: ``make fuzz CASES=1 FIRST=seed`` runs it again.
"""

import io
import logging
import os
import random
import re
import traceback
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_unlearn
from tests.fuzz import Bomb, Boom, Data, Model, draw_case, keys, xy
from tests.toys import make_trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore")
FIRST, CASES = int(os.environ.get("FUZZ_FIRST", "0")), int(os.environ.get("FUZZ_CASES", "80"))
PACKAGE = str(Path(lightning_unlearn.__file__).parent)
SAYS_WHAT_TO_DO = re.compile(r"[Ee]xpected|; |: |\b(use|name|set|add|pass|leave|give|start|make|train)\b")


class Halt(Exception):
    """Ends the fit that is compared with when there is no more to compare."""


class Watch(L.Callback):
    """What a fit does, epoch by epoch.

    Args:
        trio: the three callbacks, None for each that is left out.
        key_of: from what a sample is to its dataset index.
        until: the number of epochs on all the data.
        halts: ends the fit then.
    """

    def __init__(self, trio, key_of, bomb, until, *, halts=False):
        self.finetune, self.key_of, self.bomb = trio[2], key_of, bomb
        self.until, self.halts = until, halts
        self.rows, self.batches, self.draws, self.delivered = {}, {}, {}, {}
        self.complete, self.warm_up, self.validates = set(), None, False

    def on_train_epoch_start(self, trainer, pl_module):
        epoch = trainer.current_epoch
        self.batches[epoch] = trainer.num_training_batches
        if self.finetune is not None and self.finetune.is_active:
            self.draws[epoch] = self.finetune.training_subset
        self.bomb.tick("epoch start")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rows = self.rows.setdefault(trainer.current_epoch, [])
        rows.extend(self.key_of[key] for key in keys(xy(batch)[0]))
        self.delivered[trainer.current_epoch] = batch_idx + 1

    def on_train_batch_end(self, *_):
        self.bomb.tick("batch end")

    def on_train_epoch_end(self, trainer, pl_module):
        self.complete.add(trainer.current_epoch)
        if trainer.current_epoch == self.until - 1:
            state = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.random.get_state()[1].copy())}  # noqa: NPY002
            state["python"] = torch.tensor(random.getstate()[1])
            self.warm_up = {**weights(pl_module), **state}
            if self.halts:
                raise Halt

    def on_validation_start(self, *_):
        self.validates = True

    def on_validation_end(self, *_):
        self.validates = False


class Run:
    """One fit of a case, with or without the three callbacks."""

    def __init__(self, case, *, without=False, halts=False):
        self.bomb = Bomb(*case.bomb)
        self.dataset, x, self.label = case.datasets(self.bomb)
        self.loader = case.train_loader(self.dataset)
        self.model = Model(case, self.bomb)
        self.trainer, self.error, self.trio = None, None, (None, None, None)
        self.before = self.found()
        key_of = {key: index for index, key in enumerate(keys(x))}
        assert len(key_of) == len(self.dataset)
        self.watch = Watch(self.trio, key_of, self.bomb, case.partition["at_epoch"], halts=halts)
        val = case.val_loader()
        try:
            if not without:
                self.trio = case.callbacks()
                self.watch.finetune = self.trio[2]
            L.seed_everything(case.seed, verbose=False)
            ours = [callback for callback in self.trio if callback is not None]
            random.Random(case.seed).shuffle(ours)
            self.trainer = make_trainer([*ours, *case.others(), self.watch], **case.trainer)
            if case.as_module:
                self.trainer.fit(self.model, datamodule=Data(self.loader, val))
            else:
                self.trainer.fit(self.model, self.loader, val)
        except Exception as error:
            self.error = error

    def found(self):
        """What must be the same after the fit, whatever has happened in it."""
        loader = self.loader
        return {
            "hooks": {
                name: [len(getattr(m, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
                for name, m in self.model.named_modules()
            },
            "batch hook": "_on_before_batch_transfer" in vars(self.model),
            "modes": {name: module.training for name, module in self.model.named_modules()},
            "requires grad": {name: p.requires_grad for name, p in self.model.named_parameters()},
            "loader": [id(loader.sampler), id(loader.batch_sampler), id(loader.batch_sampler.sampler)],
        }


def is_ours(error):
    """Whether this package has refused something, on purpose and in a sentence."""
    if not isinstance(error, (ValueError, TypeError, MisconfigurationException)):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename.startswith(PACKAGE) and bool(SAYS_WHAT_TO_DO.search(str(error)))


def check_error(case, run):
    """Either ours, or the user's own, which comes without us as well."""
    if isinstance(run.error, Boom) or is_ours(run.error):
        return
    other = Run(case, without=True)
    if type(other.error) is type(run.error) and str(other.error) == str(run.error):
        return
    raise AssertionError(f"neither ours nor the user's own: {run.error!r}") from run.error


def check_given_back(case, run):
    after = run.found()
    if run.error is not None and run.watch.validates:
        # Lightning leaves a model in eval mode where validation fails.
        after["modes"] = run.before["modes"]
    for name, value in run.before.items():
        assert after[name] == value, name
    if run.trainer is None:
        return
    loop = run.trainer.fit_loop
    assert "_load_combined_loader_states" not in vars(loop)
    assert loop._data_source is None or "dataloader" not in vars(loop._data_source)
    for optimizer in run.trainer.optimizers:
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks


def check_state(run):
    states = {type(callback).__name__: callback.state_dict() for callback in run.trio if callback is not None}
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).keys() == states.keys()


def check_partition(run):
    if not run.trio[0].has_result:
        return
    partition = run.trio[0].partition
    assert len(partition) == len(run.dataset)
    assert partition.label.equal(run.label)
    for values in (partition.clean_probability, partition.suggested_probability, partition.label_evidence):
        assert ((values >= 0) & (values <= 1)).all()
    assert partition.noise_rate is None or 0 <= partition.noise_rate <= 1


def check_pruned(run):
    partition, prune, _ = run.trio
    if prune is None or not prune.has_result or partition.dry_run:
        return
    for site, mask in zip(prune._state.sites, prune.masks, strict=True):
        assert len(mask.pruned_indices()) <= max(1, prune.amount * len(mask.keep))
        for entry in site.entries(run.model, mask.pruned_indices()):
            assert (entry.parameter.index_select(entry.dimension, entry.neurons) == 0).all()


def check_samples(case, run):
    """Of every epoch: which samples were delivered, how often, in how many batches."""
    watch, size = run.watch, case.loader["batch_size"]
    has_norms = any(isinstance(module, nn.modules.batchnorm._NormBase) for module in run.model.modules())
    steps = case.schedule in ("one cycle", "restarts")
    for epoch, rows in watch.rows.items():
        if epoch == run.trainer.max_epochs:
            continue  # StochasticWeightAveraging's own, for the statistics of norms
        assert len(set(rows)) == len(rows), f"epoch {epoch} has samples twice"
        draw = watch.draws.get(epoch)
        expected, number = range(len(run.dataset)), len(run.dataset)
        if draw is not None:
            expected = draw.index.tolist()
            weight = draw.probability
            number = len(expected) if weight is None else max(1, int(weight.double().sum() + 1e-6))
            number -= has_norms and number > size > 1 and number % size == 1
        assert set(rows) <= set(expected), f"epoch {epoch} has samples that are left out"
        drops = case.loader.get("drop_last", False) and case.sampler != "own batches"
        batches = number // size if drops else -(-number // size)
        limit = run.trainer.limit_train_batches
        limited = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        # A schedule of steps may have been planned for fewer in an earlier round.
        fewer = draw is not None and steps and "every_n_epochs" in case.partition
        assert watch.batches[epoch] <= limited if fewer else watch.batches[epoch] == limited, epoch
        if epoch in watch.complete and run.error is None and "max_steps" not in case.trainer:
            assert watch.delivered[epoch] == watch.batches[epoch]
            if limited == batches and not drops and not fewer:
                assert len(rows) == number, epoch


def check_warm_up(case, run):
    """Before the partition, weights and random states are those of a fit without the callbacks."""
    if not case.compares or run.watch.warm_up is None or run.bomb.place:
        return
    other = Run(case, without=True, halts=True)
    if isinstance(other.error, Halt):
        for name, value in other.watch.warm_up.items():
            assert value.equal(run.watch.warm_up[name]) or value.isnan().any(), name


@pytest.fixture(autouse=True)
def _quiet():
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def check(seed):
    """Runs the fit of a seed and checks all that must hold; returns it."""
    case = draw_case(seed)
    print(case)  # noqa: T201  (pytest shows it where the test fails)
    run = Run(case)
    if run.error is not None:
        check_error(case, run)
    check_given_back(case, run)
    check_state(run) if run.trio[0] is not None else None
    if run.trainer is not None and run.trio[0] is not None:
        check_partition(run)
        check_pruned(run)
        check_samples(case, run)
        check_warm_up(case, run)
    return run


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_a_random_fit_keeps_its_promises_or_is_refused_in_a_sentence(seed):
    check(seed)
