"""Makes the figures of the documentation from the demo's digits: `make figures`, about two minutes.

They are drawn on white, which is read on a dark page too, and are the same for the same versions. The picture of the
report needs Chromium; `--only report` makes it alone.
"""

import argparse
import base64
import io
import sys
import tempfile
from pathlib import Path

import lightning as L
import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from PIL import Image

from lightning_unlearn import (
    AttributionPartitionCallback,
    CleanSubsetFinetuneCallback,
    NeuronMask,
    Partition,
    SensitivityPruneCallback,
    UnlearnReport,
)
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
        return RECIPES["auto"].function(evidence, reduce)

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
    # The first were made up, to try the recipe before the first step.
    return partition.partition, prune.mask, seen[-1], data.given_label != data.true_label


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


def report_of_readme(folder: Path) -> Path:
    """The report of the lines in README."""
    L.seed_everything(0)
    callbacks = [AttributionPartitionCallback(), CleanSubsetFinetuneCallback(), UnlearnReport(folder)]
    trainer = L.Trainer(max_epochs=30, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(DigitsClassifier(), datamodule=DigitsDataModule(noise=0.4))
    return folder / "report.html"


def take_picture(page: Path, folder: Path) -> bytes:
    """What Chromium shows of a page at first, as a PNG of few colors."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.report.browser import Browser

    browser = Browser(folder / "profile")
    try:
        browser.open(page)
        size = {"width": 1100, "height": 1090, "deviceScaleFactor": 1, "mobile": False}
        browser.call("Emulation.setDeviceMetricsOverride", **size)
        shot = base64.b64decode(browser.call("Page.captureScreenshot")["data"])
    finally:
        browser.close()
    found = io.BytesIO()
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(128).save(found, "PNG", optimize=True)
    return found.getvalue()


def main() -> None:
    """Writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "_static")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--only", choices=["diagrams", "report"])
    options = parser.parse_args()
    if options.only != "diagrams":
        with tempfile.TemporaryDirectory() as made:
            picture = take_picture(report_of_readme(Path(made, "found")), Path(made))
        (options.out / "report.png").write_bytes(picture)
    if options.only != "report":
        draw_diagrams(options.out, options.epochs)


def draw_diagrams(out: Path, epochs: int) -> None:
    """Writes the diagrams."""
    partition, mask, evidence, wrong = fit(epochs)
    with mpl.rc_context(LOOK):
        figures = {
            "partition": partition.plot(class_names=list("0123456789"))[0],
            "neurons": mask.plot()[0],
            "training": draw_training(evidence, wrong),
        }
        for name, figure in figures.items():
            figure.savefig(out / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
