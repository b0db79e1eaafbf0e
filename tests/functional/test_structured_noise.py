import pytest
import torch

from lightning_unlearn.functional import structured_noise
from lightning_unlearn.functional.structured_noise import find_class_noise, find_structured_noise, fit_structured_noise
from lightning_unlearn.functional.symmetric_noise import fit_symmetric_noise
from tests.ranks import run_ranks

CLASSES = 5


def draw(n, names, *, seed=0, sharp=3.0):
    """Scores that know the true class fairly well, and labels drawn from the rows of a matrix."""
    generator = torch.Generator().manual_seed(seed)
    score = sharp * torch.randn(n, CLASSES, generator=generator).double()
    truth = torch.multinomial(score.softmax(1), 1, generator=generator).squeeze(1)
    label = torch.multinomial(names[truth], 1, generator=generator).squeeze(1)
    return score, label, truth


def next_class(share):
    eye = torch.eye(CLASSES)
    return ((1 - share) * eye + share * eye.roll(1, 1)).double()


def find(score, label, candidate, **options):
    weight = torch.ones(len(label))
    base = fit_symmetric_noise(score, label, weight, biased=True, **options)
    found = find_structured_noise(score, label, weight, candidate, base, **options)
    return found[:2] if found is not None and found[2] else None


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_finds_the_matrix_that_the_labels_were_drawn_from(share):
    score, label, truth = draw(4000, next_class(share))
    noise, gain = find(score, label, next_class(0.2))
    torch.testing.assert_close(noise.transition, next_class(share), atol=0.05, rtol=0)
    assert gain > 100
    right = noise.posterior(score, label).gather(1, label.unsqueeze(1)).squeeze(1).exp()
    suspect = right < 0.5
    assert (label != truth)[suspect].double().mean().item() == pytest.approx(1 - right[suspect].mean().item(), abs=0.05)


@pytest.mark.parametrize("blind", [0.0, 0.2])
def test_blind_errors_are_no_structure(blind):
    names = ((1 - blind) * torch.eye(CLASSES) + blind / CLASSES).double()
    score, label, _ = draw(4000, names)
    assert find(score, label, next_class(0.2)) is None


def test_entries_that_are_not_there_are_dropped():
    names = torch.eye(CLASSES).double()
    names[0, 0], names[0, 3] = 0.7, 0.3
    score, label, _ = draw(6000, names)
    noise, _ = find(score, label, names + next_class(0.2))
    others = noise.transition - noise.transition.diagonal().diag()
    assert (others > 0.06).nonzero().tolist() == [[0, 3]]
    assert noise.entries == 1


def test_classes_that_overlap_everywhere_are_no_structure():
    score, label, _ = draw(500, next_class(0.2))
    weight = torch.ones(500)
    base = fit_symmetric_noise(score, label, weight)
    assert fit_structured_noise(score, label, weight, torch.full((CLASSES, CLASSES), 0.2).double(), base) is None


def test_ranks_find_what_one_finds():
    score, label, _ = draw(901, next_class(0.3))
    one, _ = find(score, label, next_class(0.2))

    def on_rank(rank, reduce):
        return find(score[rank::2], label[rank::2], next_class(0.2), reduce=reduce)

    for noise, _ in run_ranks(on_rank, 2):
        torch.testing.assert_close(noise.transition, one.transition, atol=1e-4, rtol=0)


def test_two_classes_that_are_taken_for_each_other_have_no_other_names():
    score, label, weight, candidate = scene_of_pairs()
    base = fit_symmetric_noise(score, label, weight, biased=True)
    assert find_structured_noise(score, label, weight, candidate, base) is None
    one_way = candidate.clone()
    one_way[1::2, 0::2] = 0
    assert find_structured_noise(score, label, weight, one_way, base) is not None


def scene_of_pairs(n=3000, classes=6):
    """Labels of each class that are called its neighbor's for a quarter, and of the neighbor's likewise."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(classes, (n,), generator=generator)
    label = torch.where(torch.rand(n, generator=generator) < 0.25, true ^ 1, true)
    score = 4 * torch.nn.functional.one_hot(true, classes) + torch.randn(n, classes, generator=generator)
    candidate = torch.eye(classes).mul(0.75)
    candidate[torch.arange(classes), torch.arange(classes) ^ 1] = 0.25
    return score, label, torch.ones(n), candidate


def lost(shares):
    """Labels of each class that are drawn blindly as often as that."""
    shares = torch.tensor(shares).double().unsqueeze(1)
    return (1 - shares) * torch.eye(CLASSES).double() + shares / CLASSES


def test_latent_classes_that_are_called_by_each_others_names_show_no_habit():
    score, label, _ = draw(4000, next_class(0.15))
    swapped = next_class(0.2)
    swapped[2, 2], swapped[2, 3] = swapped[2, 3].item(), swapped[2, 2].item()
    assert find(score, label, next_class(0.2)) is not None
    assert find(score, label, swapped) is None


@pytest.mark.parametrize("shares", [(0.0, 0.0, 0.4, 0.0, 0.0), (0.05, 0.5, 0.05, 0.05, 0.3)])
def test_finds_how_much_each_class_loses(shares):
    score, label, truth = draw(6000, lost(shares))
    noise, gain = find_class_noise(score, label, torch.ones(6000))
    torch.testing.assert_close(noise.transition, lost(shares), atol=0.06, rtol=0)
    assert gain > 40
    right = noise.posterior(score, label).gather(1, label.unsqueeze(1)).squeeze(1).exp()
    suspect = right < 0.5
    assert (label != truth)[suspect].double().mean().item() == pytest.approx(1 - right[suspect].mean().item(), abs=0.05)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_a_common_share_is_not_taken_for_one_of_each_class(share, seed):
    score, label, _ = draw(6000, lost([share] * CLASSES), seed=seed)
    assert find_class_noise(score, label, torch.ones(6000)) is None


def test_few_samples_and_two_classes_are_not_asked_what_each_class_loses():
    score, label, _ = draw(90, lost((0.0, 0.0, 0.9, 0.0, 0.0)))
    assert find_class_noise(score, label, torch.ones(90)) is None
    two = torch.randn(4000, 2).double()
    assert find_class_noise(two, torch.randint(0, 2, (4000,)), torch.ones(4000)) is None


def test_what_each_class_loses_is_about_the_same_of_every_so_many_samples_and_of_ranks(monkeypatch):
    score, label, _ = draw(8001, lost((0.0, 0.0, 0.4, 0.0, 0.0)))
    one, gain = find_class_noise(score, label, torch.ones(8001))

    def on_rank(rank, reduce):
        rows = slice(rank, 8001, 2) if rank < 2 else slice(0, 0)
        return find_class_noise(score[rows], label[rows], torch.ones(len(label[rows])), reduce=reduce)

    for found, of_rank in run_ranks(on_rank, 3):
        torch.testing.assert_close(found.transition, one.transition, atol=1e-3, rtol=0)
        assert of_rank == pytest.approx(gain, rel=1e-3)
    monkeypatch.setattr(structured_noise, "MOST_NUMBERS", 20_000)
    thinned, of_part = find_class_noise(score, label, torch.ones(8001))
    torch.testing.assert_close(thinned.transition, one.transition, atol=0.08, rtol=0)
    assert of_part == pytest.approx(gain, rel=0.5)
