import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Toys this small are slower on more threads, much slower where others use the cores too."""
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
