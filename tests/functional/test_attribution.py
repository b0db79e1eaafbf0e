import pytest
import torch

from lightning_unlearn.functional import class_max_attribution, label_margin, runner_up_class
from lightning_unlearn.functional.attribution import logit_difference, neuron_magnitude


def naive_class_max(gradients, activation):
    classes, batch, neurons = gradients.shape
    out = torch.zeros(batch, neurons)
    for b in range(batch):
        for d in range(neurons):
            strongest = max(gradients[c, b, d].item() for c in range(classes))
            out[b, d] = abs(strongest * activation[b, d].item())
    return out


def naive_margin(logits, label):
    return torch.tensor(
        [row[y] - max(v for c, v in enumerate(row) if c != y) for row, y in zip(logits.tolist(), label, strict=True)]
    )


def test_class_max_takes_the_maximum_before_the_magnitude():
    gradients = torch.tensor([[[1.0, -3.0]], [[-2.0, -1.0]]])
    activation = torch.tensor([[-5.0, 4.0]])
    # max(1, -2) * -5 and max(-3, -1) * 4; a maximum of magnitudes would give 10 and 12.
    assert class_max_attribution(gradients, activation).tolist() == [[5.0, 4.0]]


def test_class_max_matches_a_triple_loop():
    torch.manual_seed(0)
    gradients, activation = torch.randn(4, 6, 5), torch.randn(6, 5)
    torch.testing.assert_close(class_max_attribution(gradients, activation), naive_class_max(gradients, activation))


def test_class_max_sums_the_pixels_of_a_neuron_before_the_magnitude():
    gradients = torch.ones(1, 1, 1, 2, 2)
    activation = torch.tensor([[[[1.0, -2.0], [3.0, -6.0]]]])
    assert class_max_attribution(gradients, activation).tolist() == [[4.0]]


def test_margin_matches_a_loop():
    torch.manual_seed(0)
    logits, label = torch.randn(50, 7), torch.randint(7, (50,))
    torch.testing.assert_close(label_margin(logits, label), naive_margin(logits, label.tolist()))


def test_margin_of_two_classes_is_their_difference():
    logits = torch.tensor([[1.0, 4.0], [1.0, 4.0]])
    assert label_margin(logits, torch.tensor([0, 1])).tolist() == [-3.0, 3.0]


def test_margin_has_the_gradient_of_the_two_logits_alone():
    logits = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    label_margin(logits, torch.tensor([1])).sum().backward()
    assert logits.grad.tolist() == [[-1.0, 1.0, 0.0]]


def test_strongest_other_leaves_the_logits_as_they_are():
    logits = torch.tensor([[9.0, 1.0, 2.0], [0.0, 8.0, -1.0]])
    before = logits.clone()
    assert runner_up_class(logits, torch.tensor([0, 1])).tolist() == [2, 0]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("function", [runner_up_class, label_margin])
def test_one_class_is_refused(function):
    with pytest.raises(ValueError, match=r"at least two classes, shape \(B, C >= 2\), but got \(3, 1\)"):
        function(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("function", [runner_up_class, label_margin])
def test_more_or_fewer_rows_than_labels_are_refused(function):
    for rows in (2, 4):
        with pytest.raises(ValueError, match=f"a row of logits for each of 3 labels, but got {rows}"):
            function(torch.zeros(rows, 5), torch.zeros(3, dtype=torch.int64))


def test_logit_difference_without_another_class_is_the_logit():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 8.0, -torch.inf]])
    label, other = torch.tensor([0, 1]), torch.tensor([2, 0])
    assert logit_difference(logits, label).tolist() == [3.0, 8.0]
    assert logit_difference(logits, label, other).tolist() == [1.0, 8.0]


@pytest.mark.parametrize(
    ("attribution", "expected"),
    [
        (torch.tensor([[1.0, -2.0]]), [[1.0, 2.0]]),
        (torch.tensor([[[1.0, -3.0], [2.0, 2.0]]]), [[2.0, 4.0]]),
        (torch.tensor([[[[1.0, -3.0], [1.0, 0.0]]]]), [[1.0]]),
    ],
    ids=["neurons", "tokens", "pixels"],
)
def test_neuron_magnitude_sums_the_positions_first(attribution, expected):
    assert neuron_magnitude(attribution).tolist() == expected
