"""The private API of Lightning that trainer/fit_loop.py and train_data.py stand on. A failure here names what a release
took."""

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors.data_connector import _get_distributed_sampler
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler
from torch.utils.data import SubsetRandomSampler as Subset

from lightning_unlearn.trainer import fit_loop as fit_loop_module
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.fit_loop import (
    limited_batches,
    live_iterator,
    live_loaders,
    next_epoch,
    planned_epochs,
    runs_in_other_processes,
)
from lightning_unlearn.trainer.train_data import TrainDataSwap, TrainLoaderWatch, users_sampler
from tests.toys import Blobs, BlobsData, Toy, fit, make_trainer

PACKAGE = Path(fit_loop_module.__file__).parents[1]
# The only files that may use private names of Lightning.
FENCED = ("trainer/fit_loop.py", "trainer/train_data.py")


class Inside(L.Callback):
    """Runs a check at the start of the second epoch of a fit."""

    def __init__(self, check):
        self.check, self.result = check, None

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.result = self.check(trainer, pl_module)


def inside(check, **kwargs):
    callback = Inside(check)
    fit(Toy(), BlobsData(Blobs(101)), [callback], max_epochs=2, **kwargs)
    return callback.result


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name.isidentifier()


BY_NAME = ("getattr", "hasattr", "setattr", "delattr", "pop", "get", "setdefault", "update")


def constants(node):
    # The pieces of an f-string are not names by themselves.
    pieces = {id(piece) for text in ast.walk(node) if isinstance(text, ast.JoinedStr) for piece in text.values}
    return [str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant) and id(part) not in pieces]


def private_names(tree):
    """Names of other objects than ``self``: as attributes, by name, and as keys of ``__dict__``."""
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            found = [node.attr]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_NAME:
            found = [name for part in node.args for name in constants(part)]
            found += [keyword.arg or "" for keyword in node.keywords]
        elif isinstance(node, (ast.Subscript, ast.Compare)):
            found = constants(node)
        yield from ((name, node.lineno) for name in found)


def defined_here(tree):
    """Names that a file gives its own classes, their attributes and its functions."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef)):
            yield from (part.name for part in node.body if isinstance(part, (ast.FunctionDef, ast.ClassDef)))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "self.__dict__":
            yield from constants(node)


def foreign_private_names(source):
    tree = ast.parse(source)
    own = set(defined_here(tree))
    return {(name, line) for name, line in private_names(tree) if is_private(name) and name not in own}


def test_every_private_name_that_is_used_is_listed_and_tested():
    docstring = inspect.getsource(fit_loop_module).split('"""', 2)[1]
    sources = [(PACKAGE / file).read_text(encoding="utf-8") for file in FENCED]
    used = {name for source in sources for name, _ in foreign_private_names(source)}
    listed = set(re.findall(r"``(_\w+)``", docstring))
    assert used == listed, f"{FENCED}: what the docstring of the first lists and what they use differ"
    assert used == {*PRIVATE, "_MultiProcessingLauncher"}


# What else is private and used, and why there is no public way.
ELSEWHERE = {
    "data/loaders.py": {
        "_iterator": "a copy of a DataLoader makes its own iterator",
    },
    "data/index_tracking.py": {
        "_iterator": "persistent workers keep theirs",
        "_index_sampler": "persistent workers go on with the batch sampler that their iterator has",
        "_sampler_iter": "what the iterator of a DataLoader draws from",
        "_num_yielded": "how many batches it has delivered",
        "_sampler_iter_yielded": "how many torchdata's had drawn before a checkpoint",
    },
    "data/batch.py": {
        "_asdict": "of a named tuple, public by its documentation",
        "_fields": "of a named tuple, public by its documentation",
        "_orig_mod": "what torch.compile wraps",
    },
    "data/sample_key.py": {"_fields": "of a named tuple, public by its documentation"},
    "attribution/trace.py": {"_version": "how often a tensor has been changed in place, which nothing else tells"},
    "attribution/layers.py": {
        "_ConvNd": "torch's class of all convolutions",
        "_NormBase": "torch's class of all batch norms",
    },
    "attribution/oom.py": {"_fields": "of a named tuple, public by its documentation"},
    "cli/_completion.py": {
        "_actions": "of an argparse parser: shtab reads them too",
        "_SubParsersAction": "what argparse's add_subparsers returns",
    },
    "cli/_config.py": {"_actions": "of an argparse parser"},
    "report/samples.py": {"_asdict": "of a named tuple, public by its documentation"},
    "pruning/masking.py": {"_ConvTransposeNd": "torch's class"},
    "shrinking/channels.py": {"_ConvNd": "torch's class", "_NormBase": "torch's class"},
    "trainer/model_state.py": {
        "_buffers": "of a torch.nn.Module, also of those that it has just got",
        "_modules": "the same",
        "_non_persistent_buffers_set": "the same",
        "_forward_hooks": "of a torch.nn.Module, which no public name lists",
        "_forward_pre_hooks": "the same",
    },
    "pruning/sites.py": {
        "_ConvNd": "torch's class",
        "_ConvTransposeNd": "torch's class",
        "_NormBase": "torch's class",
    },
    "trainer/batch_rows.py": {"_fields": "of a named tuple, public by its documentation"},
    "trainer/divergence.py": {"_NormBase": "torch's class"},
    "pruning/holding.py": {"_orig": "what torch.nn.utils.prune puts behind a parameter's name"},
    "trainer/validation.py": {"_version": "how often a tensor has been changed in place, which nothing else tells"},
    "finetuning/by_key.py": {"_NormBase": "torch's class"},
    "finetuning/freezing.py": {"_NormBase": "torch's class"},
    "finetuning/train_data.py": {"_NormBase": "torch's class"},
}


def test_no_private_name_is_used_elsewhere():
    strange, kept = {}, {}
    for file in {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} - set(FENCED):
        found = foreign_private_names((PACKAGE / file).read_text(encoding="utf-8"))
        strange[file] = [f"{name} (line {line})" for name, line in sorted(found) if name not in ELSEWHERE.get(file, {})]
        kept[file] = set(ELSEWHERE.get(file, {})) - {name for name, _ in found}
    used = {file: names for file, names in strange.items() if names}
    assert not used, "move it to trainer/, or say in ELSEWHERE why it stays"
    unused = {file: names for file, names in kept.items() if names}
    assert not unused, "no longer used, but still in ELSEWHERE"
    assert set(ELSEWHERE) <= set(kept)


@pytest.mark.parametrize(
    "line",
    [
        "loop._data_source.dataloader()",
        "getattr(loop, '_data_source', None)",
        "loop.__dict__.pop('_data_source')",
        "loop.__dict__['_data_source'] = 1",
        "loop.__dict__.update(_data_source=None)",
        "self.loop._data_source = None",
        "'_data_source' in vars(loop)",
    ],
)
def test_a_private_name_is_found(line):
    assert foreign_private_names(line) == {("_data_source", 1)}


def test_what_is_ones_own_is_let_through():
    source = (
        "class Mine:\n    def __init__(self):\n        self._x = 1\n    def add(self, other):\n        return other._x"
    )
    assert foreign_private_names(source) == set()


def launcher():
    return type(make_trainer(devices=2, strategy="ddp_spawn").strategy.launcher)


def averaging():
    return pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").WeightAveraging()


def wrapped_sampler():
    return DistributedSamplerWrapper([1, 2], num_replicas=1, rank=0).dataset


# The objects that have them, and what of them must be there.
PRIVATE = {
    "_data_source": lambda: [(make_trainer().fit_loop, ())],
    "_combined_loader": lambda: [(make_trainer().fit_loop, ()), (make_trainer().fit_loop.epoch_loop.val_loop, ())],
    "_load_combined_loader_states": lambda: [(make_trainer().fit_loop, ())],
    "_data_fetcher": lambda: [(make_trainer().fit_loop, ())],
    "_last_val_dl_reload_epoch": lambda: [(make_trainer().fit_loop.epoch_loop.val_loop, ())],
    "_iterator": lambda: [(CombinedLoader([]), ())],
    "_on_before_batch_transfer": lambda: [(L.LightningModule(), ())],
    "_accelerator_connector": lambda: [(make_trainer(), ("use_distributed_sampler", "is_distributed"))],
    "_sampler": lambda: [(wrapped_sampler(), ())],
    "_average_model": lambda: [(StochasticWeightAveraging(0.1), ())],
}


@pytest.mark.parametrize("name", PRIVATE)
def test_lightning_has(name):
    for holder, parts in PRIVATE[name]():
        what = f"Lightning {L.__version__}: {type(holder).__name__} has no {name}"
        assert hasattr(holder, name), what
        assert [part for part in parts if not hasattr(getattr(holder, name), part)] == [], what


def test_weight_averaging_has_its_model():
    assert hasattr(averaging(), "_average_model"), f"Lightning {L.__version__}: WeightAveraging has no _average_model"


def test_classes_that_are_known_by_name_have_it():
    assert launcher().__name__ == "_MultiProcessingLauncher", f"Lightning {L.__version__}: the launcher is another"
    assert DistributedSamplerWrapper.__name__ == "DistributedSamplerWrapper"


@pytest.mark.parametrize("name", ["setup_data", "epoch_progress", "max_epochs"])
def test_the_fit_loop_has(name):
    assert hasattr(make_trainer().fit_loop, name), f"Lightning {L.__version__}: FitLoop has no {name}"


def test_the_transfer_hook_has_its_parameters():
    parameters = inspect.signature(L.LightningModule._on_before_batch_transfer).parameters
    assert {"batch", "dataloader_idx"} <= set(parameters), (
        f"Lightning {L.__version__}: _on_before_batch_transfer has other parameters"
    )


def test_setup_data_asks_the_source_only_while_there_is_no_loader():
    def check(trainer, _):
        loop = trainer.fit_loop
        before, data = loop._combined_loader, trainer.datamodule
        assert isinstance(before, CombinedLoader)
        assert len(before.flattened) == 1
        loop.setup_data()
        asked = [data.train_loaders_made]
        loop._combined_loader = None
        loop.setup_data()
        asked.append(data.train_loaders_made)
        return asked

    assert inside(check) == [1, 2], f"Lightning {L.__version__}: FitLoop.setup_data works in another way"


def test_the_source_asks_whatever_stands_on_it():
    def check(trainer, _):
        loop = trainer.fit_loop
        loader = loop._data_source.dataloader()
        short = BlobsData(Blobs(20)).train_dataloader()
        loop._data_source.dataloader = lambda: short
        loop._combined_loader = None
        loop.setup_data()
        batches = trainer.num_training_batches
        del loop._data_source.dataloader
        return len(loader), batches, len(loop._data_source.dataloader())

    assert inside(check) == (7, 2, 7), (
        f"Lightning {L.__version__}: FitLoop._data_source.dataloader works in another way"
    )


def test_what_is_attached_is_detached():
    def check(trainer, _):
        swap, source = TrainDataSwap(), trainer.fit_loop._data_source
        context = FitContext(trainer, None, None)
        swap.attach(context, lambda loader: loader)
        attached = swap.is_attached, "dataloader" in source.__dict__
        swap.detach(context)
        return attached, (swap.is_attached, "dataloader" in source.__dict__)

    assert inside(check) == ((True, True), (False, False))


class Watching(L.Callback):
    """Notes the train loaders as they are shown, and whether an iterator has been made of them by then."""

    def __init__(self):
        self.watch, self.shown = TrainLoaderWatch(), []

    def setup(self, trainer, pl_module, stage):
        self.watch.attach(
            FitContext(trainer, pl_module, None),
            lambda loaders: self.shown.append((loaders, live_iterator(trainer)[0])),
        )

    def teardown(self, trainer, pl_module, stage):
        self.watch.detach()


def test_train_loaders_are_shown_before_an_iterator_is_made_and_at_every_reload():
    watching = Watching()
    trainer = fit(Toy(), BlobsData(Blobs(101)), [watching], max_epochs=3, reload_dataloaders_every_n_epochs=1)
    # At the second epoch the iterator of the first is still there, of the loader that was replaced.
    assert [iterator is None for _, iterator in watching.shown[:1]] == [True]
    assert len({id(loaders[0]) for loaders, _ in watching.shown}) == 3
    assert "_load_combined_loader_states" not in trainer.fit_loop.__dict__
    assert live_loaders(make_trainer()) == []


def test_the_live_iterator_is_that_of_the_train_loader():
    def check(trainer, _):
        return live_loaders(trainer), live_iterator(trainer), trainer.train_dataloader

    loaders, (iterator, waiting), loader = inside(check)
    assert loaders == [loader]
    assert iterator._index_sampler is loader.batch_sampler, f"Lightning {L.__version__}: the fetcher's iterators"
    assert waiting == 0


def test_the_epoch_that_samplers_get_is_known():
    assert inside(lambda trainer, _: (next_epoch(trainer), trainer.current_epoch)) == (1, 1)


@pytest.mark.parametrize(("limit", "batches"), [(1.0, 7), (3, 3), (30, 7), (0.5, 3), (0.01, 0)])
def test_batches_are_limited_as_lightning_limits_them(limit, batches):
    trainer = make_trainer(limit_train_batches=limit)
    assert limited_batches(trainer, 7) == batches
    if batches:
        assert inside(lambda trainer, _: trainer.num_training_batches, limit_train_batches=limit) == batches


def test_planned_epochs_are_what_estimated_stepping_batches_counts():
    def check(trainer, _):
        with planned_epochs(trainer, 5):
            planned = trainer.estimated_stepping_batches
        with planned_epochs(trainer, None):
            same = trainer.estimated_stepping_batches
        return planned, same, trainer.max_epochs

    assert inside(check) == (35, 14, 2)
    assert "max_epochs" in inspect.signature(_FitLoop.__init__).parameters


class TwoRanks:
    """A DDP Trainer's answers, without the processes."""

    world_size = 2

    def __init__(self, *, splits=True):
        self._accelerator_connector = SimpleNamespace(use_distributed_sampler=splits, is_distributed=True)


def drawn_from(trainer, loader):
    return users_sampler(trainer, loader, loader.batch_sampler.sampler, loader.sampler)


def test_the_users_sampler_is_found_before_and_after_lightning_has_wrapped_it():
    data = Blobs(20)
    mine = Subset(range(5))
    wrapped = DistributedSamplerWrapper(mine, num_replicas=2, rank=0)
    assert drawn_from(TwoRanks(), DataLoader(data, sampler=mine)) == (mine, True)
    assert drawn_from(TwoRanks(), DataLoader(data, sampler=wrapped)) == (mine, True)
    assert drawn_from(TwoRanks(splits=False), DataLoader(data, sampler=mine)) == (mine, False)
    own = DistributedSampler(data, num_replicas=2, rank=0, shuffle=False)
    assert drawn_from(TwoRanks(), DataLoader(data, sampler=own)) == (own, False)
    assert drawn_from(TwoRanks(), DataLoader(data, batch_sampler=BatchSampler(own, 4, False)))[0] is own


@pytest.mark.parametrize(
    "loader",
    [
        {"sampler": RandomSampler(range(20), replacement=True, num_samples=3)},
        {"sampler": SequentialSampler(range(5))},
        {"batch_sampler": BatchSampler(Subset(range(5)), 4, False)},
    ],
    ids=["with replacement", "in order", "batch sampler"],
)
def test_what_lightning_puts_in_the_place_of_a_sampler_is_known_before_it_does(loader):
    loader = DataLoader(Blobs(20), **loader)
    sampler, is_split = drawn_from(TwoRanks(), loader)
    lightnings = _get_distributed_sampler(loader, True, 0, RunningStage.TRAINING, num_replicas=1, rank=0)
    assert type(sampler) is type(lightnings) is DistributedSampler
    assert (sampler.dataset, sampler.shuffle, is_split) == (lightnings.dataset, lightnings.shuffle, True)


def test_whether_lightning_splits_samplers_is_where_it_was():
    for splits in (True, False):
        connector = make_trainer(use_distributed_sampler=splits)._accelerator_connector
        assert (connector.use_distributed_sampler, connector.is_distributed) == (splits, False)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_spawning_and_forking_strategies_are_known_by_their_launcher(strategy):
    assert runs_in_other_processes(L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False))
    assert not runs_in_other_processes(L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False))
    assert not runs_in_other_processes(make_trainer())
