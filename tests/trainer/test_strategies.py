"""Strategies that are refused by name, and what is said of others; those that work are in test_ddp, test_fsdp, ..."""

import lightning as L
import pytest
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_unlearn.trainer.strategies import check_strategy
from tests.toys import Toy, make_trainer, trio

FSDP2 = r"use ModelParallelStrategy\(data_parallel_size=\.\.\., tensor_parallel_size=1\) with fully_shard \(FSDP2\), or"
GPU = r"use Trainer\(accelerator='gpu', strategy='ddp'\)\."
# Lightning's own are not set up, for want of their devices and packages; those of other packages have stand-ins.
REFUSED = {
    FSDPStrategy: FSDP2,
    DeepSpeedStrategy: FSDP2,
    XLAStrategy: GPU,
    SingleDeviceXLAStrategy: GPU,
    type("XLAFSDPStrategy", (Strategy,), {}): GPU,
    type("SingleHPUStrategy", (SingleDeviceStrategy,), {}): GPU,
    type("HPUDDPStrategy", (DDPStrategy,), {}): GPU,
    type("HivemindStrategy", (Strategy,), {}): r"use Trainer\(strategy='ddp'\)\.",
    type("ColossalAIStrategy", (DDPStrategy,), {}): FSDP2,
    type("MyOwn", (Strategy,), {}): r"use Trainer\(strategy='ddp'\) or Trainer\(devices=1\)\.",
    type("MyOwn", (DeepSpeedStrategy,), {}): FSDP2,
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("who", range(3))
def test_a_strategy_that_is_not_handled_is_refused_by_name(kind, who, monkeypatch):
    callback = trio(2)[who]
    trainer = make_trainer([callback])
    monkeypatch.setattr(kind, "__abstractmethods__", frozenset())
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", kind.__new__(kind))
    name = type(callback).__name__
    with pytest.raises(MisconfigurationException, match=f"{name} works .* uses {kind.__name__}, .*; {REFUSED[kind]}"):
        callback.setup(trainer, Toy(), "fit")


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true", DDPStrategy(static_graph=True)])
def test_what_is_supported_passes_in_silence(strategy, recwarn):
    check_strategy(L.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False), "Somebody")
    assert not [warning for warning in recwarn if "Somebody" in str(warning.message)]


def test_a_strategy_of_a_users_own_that_is_ddp_passes():
    class Mine(DDPStrategy):
        pass

    check_strategy(L.Trainer(accelerator="cpu", devices=1, strategy=Mine(), logger=False), "Somebody")


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_where_the_fit_runs_in_other_processes_it_says_that_results_stay_there(strategy):
    with pytest.warns(UserWarning, match="so results of Somebody are not available in the main process. Read them"):
        check_strategy(L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False), "Somebody")
