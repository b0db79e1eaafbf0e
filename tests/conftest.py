import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Toys this small are slower on more threads, much slower where others use the cores too.

    Of the session, so that fixtures of a module compute with as many threads as its tests: sums depend on it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _not_deterministic():
    """What ``Trainer(deterministic=True, benchmark=True)`` sets holds for the process, and would meet later tests."""
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
