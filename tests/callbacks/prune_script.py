"""What test_prune_ddp.py runs in processes of its own, one for each rank."""

import torch

from lightning_unlearn import SensitivityPruneCallback
from lightning_unlearn.pruning.criteria import Sensitivity
from lightning_unlearn.trainer.validation import score_samples, score_validation
from tests.callbacks.published import Planted, PlantedData, Published, make_partition
from tests.callbacks.test_prune_guard import class_zero_is_suspect
from tests.toys import fit, weights

SIZE = 101
CASES = {
    "guard": {},
    "no validation": {},
    "no penalty": {"criterion": Sensitivity(l2_penalty=0.0)},
    "magnitude": {"criterion": "magnitude", "max_val_drop": None},
    "hessian": {"criterion": "hessian", "max_val_drop": None},
    "std": {"criterion": "std_ratio"},
}


class Odd(PlantedData):
    """A validation set that two ranks cannot share evenly."""

    def val_dataloader(self):
        loader = super().val_dataloader()
        if self.validation:
            loader = torch.utils.data.DataLoader(torch.utils.data.Subset(loader.dataset, range(SIZE)), batch_size=16)
        return loader


class Scores(SensitivityPruneCallback):
    """Notes the scores too."""

    def _prune(self, trainer, pl_module, partition):
        index = torch.tensor([3, 5, 5, 100, 7])
        self.scores = [
            score_samples(self.fit, index),
            score_validation(self.fit),
        ]
        super()._prune(trainer, pl_module, partition)


def run(folder, devices):
    distributed = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    found = {}
    for name, arguments in CASES.items():
        data = Odd(SIZE, validation=name != "no validation")
        prune = Scores("fc", **{"amount": 0.5, **arguments})
        module = Planted()
        published = Published(make_partition(class_zero_is_suspect(data), data.y))
        trainer = fit(module, data, [prune, published], max_epochs=3, **distributed)
        found[name] = {
            "state": prune.state_dict(),
            "weights": weights(module),
            "said": prune.summary_clause(),
            "scores": [None if s is None else (s.accuracy, s.loss, s.samples) for s in prune.scores],
        }
    torch.save(found, folder / f"{devices}-{trainer.global_rank}.pt")
