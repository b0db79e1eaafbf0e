"""The options of the callbacks, each in a line, as ``init`` prints them."""

from __future__ import annotations

from typing import Any, NamedTuple


class Option(NamedTuple):
    """An option of a callback.

    Args:
        name: of the constructor's argument.
        value: that is set, or the default.
        what: it is, and when to change it.
        is_set: whether it is set; else it stands as a comment.
    """

    name: str
    value: Any
    what: str
    is_set: bool = False


PARTITION = [
    Option("at_epoch", "auto", "once the evidence has peaked; or a number of epochs, or a share of max_epochs as 0.5"),
    Option("recipe", "auto", "wrong labels and corrupted inputs; label or input for one of them, rlap for the paper's"),
    Option("layer", None, "where attributions are taken; the default, the head's input, is right for wrong labels"),
    Option("input_layer", None, "early layer that shows corrupted inputs; the default: behind the first block"),
    Option("every_n_epochs", None, "draw it again after so many epochs; a third of those that remain is a good choice"),
    Option("evidence", "training", "read off the training steps; passes: in eval mode, if training batches are mixed"),
    Option("precision", 0.85, "share of the suspects that is expected to be wrong; raise for fewer, surer ones"),
    Option("min_class_share", 0.1, "of each class kept in any case; raise where a rare class would be lost"),
    Option("action", "act", "report: say what would be done, and change nothing"),
    Option("review", None, "suspects.csv in which a person has filled the column decision"),
    Option("judge_validation", False, "judge the validation samples too; their labels count in the accuracy"),
    Option("task", "auto", "multiclass, binary or multilabel, where the first batch does not tell"),
    Option("soft_labels", "refuse", "argmax: labels that are probabilities count as their largest class"),
    Option("ignore_index", -100, "the label that means none"),
    Option("batch_to_xy", None, "dotted path of a function from a batch to (x, y), where a batch is something else"),
    Option("logits_from", None, "dotted path of a function from what forward returns to logits"),
]
PRUNE = [
    Option("layer", None, "Linear or convolution to prune, or a list; the default: the inputs of the head"),
    Option("amount", 0.15, "share of the layer's neurons to prune at most"),
    Option("criterion", "sensitivity", "eight others to compare with, as magnitude or taylor"),
    Option("guard", True, "measure, and take back what makes validation worse"),
    Option("max_val_drop", 0.01, "how much validation accuracy may fall"),
]
FINETUNE = [
    Option("mode", "full", "layers: train the pruned layer and those behind it only, which is faster"),
    Option("layers", None, "with mode layers: dotted paths of the modules to train"),
    Option("on_noisy", "drop", "weigh: draw by p(clean); relabel: use the suggested label where it is likely enough"),
    Option("relabel_threshold", 0.7, "least probability of a suggested label that is used"),
    Option("reset_head", False, "give the head new weights first, where it has memorized much"),
    Option("lr", 1e-3, "of a fresh optimizer; leave out to go on with the optimizer and schedule as they are", True),
    Option("optimizer", None, "class_path and init_args instead of configure_optimizers, as torch.optim.AdamW"),
    Option("lr_scheduler", None, "class_path and init_args, stepped once an epoch"),
    Option("warm_start", "auto", "keep, shrink or start: weights as they are, moved back, or those of the start"),
    Option("restart_optimizer", False, "without lr: run configure_optimizers again, for the epochs that remain"),
]
REPORT = [
    Option("dir", None, "run directory; the default: unlearn in the logger's folder"),
    Option("class_names", None, "a list, by label; the default: those of the data set, as an ImageFolder has"),
    Option("samples", 200, "how many of the most suspect samples are shown"),
    Option("mean", None, "that transforms have subtracted from each channel of a picture, a list"),
    Option("std", None, "by which they have divided it, a list"),
    Option("sample_rate", None, "of sounds, per second"),
]
