"""What can be known of a GPU without one: no tensors of two devices meet, and training steps do not wait for it."""

import json

import pytest

from tests.callbacks import forked, simulated_device_script
from tests.callbacks.simulated_device import IS_SUPPORTED
from tests.callbacks.simulated_device_script import AT, CASES, EPOCHS, SIZE

pytestmark = pytest.mark.skipif(not IS_SUPPORTED, reason="needs a torch whose backends can be made in Python")
STEPS = SIZE // 16


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    ended = forked.call(simulated_device_script.compare, folder)
    assert ended.returncode == 0, ended.stdout[-3000:]
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_a_device_finds_what_the_cpu_finds(found, case):
    on_cpu, on_device = found[case]["clean"]
    assert on_device == pytest.approx(on_cpu, abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_training_steps_do_not_wait_for_the_device(found, case):
    waits = found[case]["waits"]
    for epoch in range(1, EPOCHS):
        told = waits[str(epoch)]
        # Evidence of training steps is handed on once for 16 of them; after the partition nothing is, but for the few
        # steps that show whether the loss follows new labels.
        most = 5 * (STEPS // 16) if epoch < AT and "passes" not in case else 0
        most += 3 * 3 if epoch == AT and "relabel" in case else 0
        assert sum(told.values()) <= most, (epoch, told)
