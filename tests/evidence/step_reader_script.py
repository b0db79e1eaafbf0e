"""What test_training_pass.py runs in processes of its own, one for each rank."""

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

from tests.evidence.test_step_reader import BATCH, Coded, Driver, Net, mixup
from tests.toys import fit


def mixes_on_rank_1(module, x, y):
    return mixup(1.0)(module, x, y) if module.global_rank == 1 else cross_entropy(module(x), y)


def run(folder, name):
    data = Coded()
    module, driver = Net(mixes_on_rank_1 if name == "one mixes" else None), Driver()
    settings = {"max_epochs": 2, "devices": 2, "strategy": "ddp"}
    if name == "own sampler":
        trainer = fit_own_sampler(module, driver, data, settings)
    else:
        trainer = fit(module, DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=1), [driver], **settings)
    result = {
        "reason": driver.reader.reason,
        "goes_on": driver.goes_on,
        "forgotten": driver.sink.forgotten,
        "read": [torch.cat([row[0] for row in rows]).tolist() if rows else [] for rows in driver.sink.epochs[:2]],
        "noted": [torch.cat([row[0] for row in rows]).tolist() for rows in module.noted.values()],
    }
    torch.save(result, folder / f"{name}-{trainer.global_rank}.pt")


class OwnSampler(Net):
    """Makes its loader where the rank is known."""

    data = None

    def train_dataloader(self):
        sampler = DistributedSampler(self.data, self.trainer.world_size, self.trainer.global_rank)
        return DataLoader(self.data, batch_size=BATCH, sampler=sampler)


def fit_own_sampler(module, driver, data, settings):
    module.__class__, module.data = OwnSampler, data
    return fit(module, None, [driver], use_distributed_sampler=False, **settings)


def run_all(folder):
    for scenario in ("reads", "own sampler", "one mixes"):
        run(folder, scenario)
