"""What is drawn of a partition and of a mask, read back from the axes."""

import runpy
import sys

import numpy as np
import pytest
import torch

from lightning_unlearn import NeuronMask, Partition
from lightning_unlearn.results import plots
from lightning_unlearn.results.plots import new_axes, pixels

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def partition_of(probability, label, suggested, *, is_clean=None, reason=1, several=None, **kwargs):
    probability, label = torch.tensor(probability), torch.tensor(label)
    is_clean = probability >= 0.5 if is_clean is None else torch.tensor(is_clean)
    count = len(probability)
    return Partition(
        **{
            "clean_probability": probability,
            "is_clean": is_clean,
            "suggested_label": torch.tensor(suggested),
            "suggested_probability": torch.ones(count),
            "noise_rate": 0.25,
            "label": label,
            "label_evidence": torch.ones(count),
            "input_evidence": torch.ones(count),
            "reason": torch.where(is_clean, 0, reason).to(torch.uint8),
            "noise_matrix": torch.zeros(0, 0),
            "recipe": "label",
            "layer": "nowhere",
            "epoch": 1,
            "label_probability": torch.zeros(0, 0) if several is None else torch.tensor(several),
            **kwargs,
        }
    )


def of_classes(classes, size=2000):
    """Every fourth sample of class c is suggested to be c + 1."""
    label = torch.arange(size) % classes
    wrong = torch.rand(size, generator=torch.Generator().manual_seed(0)) < 0.25
    return partition_of(
        torch.where(wrong, 0.1, 0.9).tolist(), label.tolist(), torch.where(wrong, (label + 1) % classes, label).tolist()
    )


SMALL = partition_of([0.91, 0.11, 0.21, 0.81, 0.31], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0])


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def numbers(axes):
    return sorted((text.get_position(), text.get_text()) for text in axes.texts)


def drawn(axes):
    """The axes are drawn, so that what matplotlib would refuse fails."""
    return pixels(axes.figure)


def test_a_histogram_counts_both_sides_and_shows_the_cut():
    figure, axes = SMALL.plot(kind="histogram")
    assert figure is axes.figure
    assert sorted(legend(axes)) == ["clean: 2", "cut: 0.5", "suspect: 3 (label 3)"]
    suspect, clean = (container.datavalues for container in axes.containers)
    assert (suspect[4], suspect[8], suspect[12], suspect.sum()) == (1, 1, 1, 3)
    assert (clean[36], clean.sum()) == (1, 2)
    assert axes.get_title() == "5 samples, estimated noise rate 25.0%"


@pytest.mark.parametrize(
    ("probability", "is_clean", "cut"),
    [
        ([0.2, 0.4, 0.7], None, "cut: 0.5"),
        ([0.2, 0.7, 0.9], [False, False, True], "cut: 0.8"),
        ([0.2, 0.7, 0.1], [False, True, True], "cut: 0.5"),  # the last is kept so that its class is not empty
        ([0.6, 0.7, 0.8], None, None),
    ],
    ids=["default", "threshold above", "kept below", "no suspects"],
)
def test_the_cut_lies_between_suspect_and_clean(probability, is_clean, cut):
    _, axes = partition_of(probability, [0, 1, 1], [0, 1, 1], is_clean=is_clean).plot(kind="histogram")
    assert [line for line in legend(axes) if line.startswith("cut")] == ([cut] if cut else [])


def test_a_heat_map_counts_given_against_suggested_labels():
    _, axes = SMALL.plot(kind="confusion", class_names=["cat", "dog"])
    assert numbers(axes) == [((0, 1), "2"), ((1, 0), "1")]
    share = axes.images[0].get_array()
    assert share[1, 0] == pytest.approx(2 / 3)
    assert share.mask.tolist() == [[True, False], [False, True]]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat", "dog"]
    assert axes.get_title() == "3 suggested another label"


def test_suspects_for_their_input_are_no_confusion():
    _, axes = partition_of([0.1, 0.1], [0, 1], [1, 0], reason=2).plot(kind="confusion")
    assert numbers(axes) == []


def test_names_follow_the_rule_of_the_table():
    partition = partition_of([0.9, 0.1], [0, 1], [0, 0], noise_matrix=torch.eye(2))
    for names in (["cat"], ["cat", "dog", "bird"], "cats"):
        for use in (partition.plot, partition.names_of):
            with pytest.raises(ValueError, match="Expected class_names to name each of 2 classes, but got"):
                use(class_names=names)


def test_both_are_drawn_side_by_side():
    figure, (left, right) = SMALL.plot()
    assert left.figure is right.figure is figure
    assert left.containers
    assert right.images
    drawn(left)


@pytest.mark.parametrize(
    ("classes", "ticks", "cells"), [(2, 2, 2), (12, 12, 12), (25, 25, 0), (100, 10, 0), (300, 10, 0)]
)
def test_few_and_many_classes(classes, ticks, cells):
    _, axes = of_classes(classes).plot(kind="confusion")
    assert len(axes.get_xticks()) == len(axes.get_yticks()) == ticks
    assert len(axes.texts) == cells
    assert axes.images[0].get_array().shape == (min(classes, 100),) * 2
    assert ("(100 of 300 classes)" in axes.get_title()) == (classes == 300)


def test_of_many_classes_the_most_confused_are_shown():
    label = list(range(200))
    probability = [0.9] * 199 + [0.1]
    _, axes = partition_of(probability, label, [*range(199), 150]).plot(kind="confusion")
    assert axes.images[0].get_array().count() == 1


def test_several_labels_have_a_row_each():
    label, suggested = [[1, 0], [1, 1], [0, 0]], [[0, 0], [1, 1], [0, 1]]
    partition = partition_of([0.1, 0.9, 0.2], label, suggested, several=[[0.1, 0.9], [0.9, 0.9], [0.9, 0.2]])
    _, (_, axes) = partition.plot(class_names=["odd", "even"])
    # Of two samples that are odd one is probably not; of two that are not even one probably is.
    assert numbers(axes) == [((0, 0), "1"), ((1, 1), "1")]
    assert axes.images[0].get_array()[0, 0] == pytest.approx(1 / 2)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["odd", "even"]


def test_names_are_text_and_not_mathematics():
    _, axes = SMALL.plot(kind="confusion", class_names=[r"$\frac{", "a\nname <script> that goes on"])
    drawn(axes)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [r"\$\frac{", "a name <script>…"]


def test_samples_that_are_not_judged_are_left_out():
    _, axes = partition_of([1.0, 0.9, 0.1], [-1, 0, 1], [-1, 0, 0]).plot(kind="histogram")
    assert axes.get_title() == "2 samples, estimated noise rate 25.0% (1 not judged)"


@pytest.mark.filterwarnings("error")
def test_an_empty_partition_is_drawn():
    none, labels = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    partition = Partition(
        clean_probability=none,
        is_clean=none.bool(),
        suggested_label=labels,
        suggested_probability=none,
        noise_rate=0.0,
        label=labels,
        label_evidence=none,
        input_evidence=none,
        reason=none.byte(),
        noise_matrix=torch.zeros(0, 0),
        recipe="label",
        layer="fc",
        epoch=1,
    )
    _, (left, _) = partition.plot()
    drawn(left)


def test_given_axes_are_drawn_in():
    figure, axes = plt.subplots(1, 2)
    assert SMALL.plot(axes) == (figure, tuple(axes))
    assert SMALL.plot(axes[0], kind="histogram") == (figure, axes[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "pie"}, "Expected kind to be 'both', 'histogram' or 'confusion', but got 'pie'"),
        ({"class_names": ["one"]}, "Expected class_names to name each of 2 classes, but got 1 names"),
        ({"class_names": "ab"}, "but got the text 'ab'"),
        ({"ax": "here", "kind": "histogram"}, "Expected ax to be one matplotlib Axes, but got 'here'"),
    ],
    ids=["kind", "names", "text", "axes"],
)
def test_what_cannot_be_drawn_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SMALL.plot(**arguments)


def test_one_axes_for_both_is_refused_saying_what_to_choose():
    with pytest.raises(ValueError, match=r"2 matplotlib Axes.*choose kind='histogram' or kind='confusion'"):
        SMALL.plot(plt.subplots()[1])


def ground(axes):
    return np.mean(matplotlib.colors.to_rgb(axes.get_facecolor()))


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_marks_stand_out_from_a_light_and_a_dark_ground(style):
    with plt.style.context(style):
        _, (left, right) = of_classes(100).plot()
    palest = right.images[0].cmap(0.0)[:3]
    for color in (palest, *(container.patches[0].get_facecolor()[:3] for container in left.containers)):
        assert abs(np.mean(color) - ground(left)) > 0.12
    # Where there is more, there is more of a contrast.
    assert abs(np.mean(right.images[0].cmap(1.0)[:3]) - ground(right)) > abs(np.mean(palest) - ground(right))


MASK = NeuronMask(
    "net.fc",
    keep=torch.tensor([True, False, True, True]),
    sensitivity=torch.tensor([0.3, -0.4, 0.0, -0.1]),
    standard_error=torch.tensor([0.1, 0.2, 0.0, 0.1]),
)


def test_neurons_are_drawn_in_order_with_errors_and_the_pruned_ones_marked():
    figure, axes = MASK.plot()
    assert figure is axes.figure
    assert legend(axes) == ["constant: 1", "kept: 2", "pruned: 1 (1)"]
    found = {
        container.get_label().split(":")[0]: container.lines[0].get_xydata().tolist() for container in axes.containers
    }
    assert found["pruned"] == [pytest.approx([0, -0.4])]
    assert found["kept"] == [pytest.approx([1, -0.1]), pytest.approx([3, 0.3])]
    (bars,) = axes.containers[2].lines[2]
    assert bars.get_segments()[0][:, 1].tolist() == pytest.approx([-0.6, -0.2])
    drawn(axes)


def test_a_score_without_error_and_numbers_that_are_none():
    mask = NeuronMask("fc", torch.ones(3, dtype=torch.bool), torch.tensor([1.0, float("inf"), float("nan")]))
    _, axes = mask.plot()
    drawn(axes)
    assert axes.get_ylabel() == "score"
    assert axes.get_xlabel() == "neurons, the lowest first (2 not finite, left out)"


def test_many_neurons_are_not_named():
    _, axes = NeuronMask("fc", torch.arange(500) > 50, torch.linspace(-1, 1, 500), torch.ones(500)).plot()
    assert legend(axes) == ["kept: 449", "pruned: 51"]


def test_a_figure_of_ones_own_is_unknown_to_pyplot():
    before = plt.get_fignums()
    axes = new_axes(2)
    figure, _ = SMALL.plot(axes)
    picture = pixels(figure)
    assert plt.get_fignums() == before
    assert picture.shape == (500, 1200, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 0


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    for module in ("matplotlib", "matplotlib.axes", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        SMALL.plot()
    with pytest.raises(ImportError, match="pip install matplotlib"):
        MASK.plot()


def test_matplotlib_is_imported_when_something_is_drawn(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "plot_mask" in runpy.run_path(plots.__file__)
