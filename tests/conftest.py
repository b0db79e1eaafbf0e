import functools
import gc
import sys

import pytest

# Nothing that takes long to import: pytest-xdist's own process, before which no other starts, reads this file too.

LONGEST_FIRST = [
    "tests/test_examples.py",
    "tests/callbacks/test_fsdp.py",
    "tests/test_fuzz.py",
    "tests/callbacks/test_ddp_kinds.py",
    "tests/callbacks/test_killed.py",
    "tests/callbacks/test_rounds.py",
    "tests/callbacks/test_resume.py",
    "tests/callbacks/test_finetune.py",
    "tests/evidence/test_step_reader.py",
    "tests/callbacks/test_exceptions.py",
    "tests/callbacks/test_leaves_model_as_found.py",
    "tests/callbacks/test_tasks.py",
    "tests/callbacks/test_ddp.py",
    "tests/trainer/test_compat.py",
    "tests/callbacks/test_prune.py",
    "tests/callbacks/test_models.py",
    "tests/callbacks/test_relabel.py",
    "tests/demo/test_arms.py",
    "tests/test_paper_examples.py",
    "tests/test_benchmarks_command.py",
    "tests/test_readme.py",
]
"""Files of 10 seconds and more. A process that takes one of them last keeps the others waiting for it."""


def pytest_configure(config):
    config.option.loadscopereorder = False  # by their number of tests, it would be


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


def pytest_collection_finish():
    """What is there by now stays, so that no ``gc.collect()`` need look through a million objects for it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Toys this small are slower on more threads, much slower where others use the cores too.

    Of the session, so that fixtures of a module compute with as many threads as its tests: sums depend on it.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _packages_are_listed_once():
    """Lightning asks for callbacks of other packages at every Trainer, for which the metadata of all are read."""
    with pytest.MonkeyPatch.context() as patch:
        if registry := sys.modules.get("lightning.fabric.utilities.registry"):
            patch.setattr(registry, "entry_points", functools.cache(registry.entry_points))
        yield


@pytest.fixture(autouse=True)
def _not_deterministic():
    """What ``Trainer(deterministic=True, benchmark=True)`` sets holds for the process, and would meet later tests."""
    import torch

    benchmark = torch.backends.cudnn.benchmark
    yield
    if torch.are_deterministic_algorithms_enabled():  # the call imports torch._inductor, which takes a second
        torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
