"""Makes the figures of the documentation from the demo's digits: `make figures`, about half a minute.

They are drawn on white, which is read on a dark page too, and are the same for the same versions.
"""

import argparse
from pathlib import Path

import lightning as L
import matplotlib as mpl
import torch
from matplotlib import pyplot as plt

from lightning_unlearn import AttributionPartitionCallback, NeuronMask, Partition, SensitivityPruneCallback
from lightning_unlearn.demo import DigitsClassifier, DigitsDataModule
from lightning_unlearn.recipes import RECIPES
from lightning_unlearn.recipes.evidence import Evidence

LOOK = {
    "svg.hashsalt": "lightning-unlearn",
    "svg.fonttype": "none",
    "font.size": 9,
    "figure.constrained_layout.use": True,
}


def fit(epochs: int) -> tuple[Partition, NeuronMask, Evidence, torch.Tensor]:
    """A fit on digits with 40 % wrong labels: what was found, on which evidence, and which labels are wrong, (N,)."""
    seen: list[Evidence] = []

    def auto(evidence, reduce):
        seen.append(evidence)
        return RECIPES["auto"].judge(evidence, reduce)

    torch.set_num_threads(1)
    L.seed_everything(0)
    data, partition = DigitsDataModule(noise=0.4), AttributionPartitionCallback(at_epoch=epochs, recipe=auto)
    prune = SensitivityPruneCallback()
    trainer = L.Trainer(
        max_epochs=epochs + 1,
        callbacks=[partition, prune],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(DigitsClassifier(), datamodule=data)
    return partition.partition, prune.mask, seen[0], data.given_label != data.true_label


def draw_training(evidence: Evidence, wrong: torch.Tensor) -> plt.Figure:
    """The margin of the given label in each quarter of training: right labels, and wrong ones that are memorized."""
    classes = evidence.attribution @ evidence.basis.T  # (n, P, C)
    given = torch.nn.functional.one_hot(evidence.label, classes.shape[2]).bool()[:, None]
    margin = classes.masked_select(given).view(classes.shape[:2]) - classes.masked_fill(given, -torch.inf).amax(2)
    figure, axes = plt.subplots(figsize=(5.5, 3.2))
    for name, rows, color in (("right labels", ~wrong, "tab:blue"), ("wrong labels", wrong, "tab:orange")):
        low, middle, high = margin[rows[evidence.index]].quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0)
        place = range(len(middle))
        axes.plot(place, middle, "o-", color=color, label=f"{name} (median, and 8 in 10)")
        axes.fill_between(place, low, high, color=color, alpha=0.2)
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_xticks(range(5), ["quarter 1", "2", "3", "4", "last pass"])
    axes.set(xlabel="training", ylabel="margin of the given label")
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "_static")
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    partition, mask, evidence, wrong = fit(options.epochs)
    with mpl.rc_context(LOOK):
        figures = {
            "partition": partition.plot(class_names=list("0123456789"))[0],
            "neurons": mask.plot()[0],
            "training": draw_training(evidence, wrong),
        }
        for name, figure in figures.items():
            figure.savefig(options.out / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
