import math
import sys
import zipfile
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.noise import (
    CIFAR10_ASYMMETRIC,
    GaussianInputs,
    NoiseAtSnr,
    NoisyLabels,
    PaperImageNoise,
    PaperMfccNoise,
    asymmetric_labels,
    human_labels,
    matrix_labels,
    symmetric_labels,
)

CLASSES = 5
LABEL = torch.arange(1000) % CLASSES


def images(n=40, dtype=torch.float32):
    """Items (x, y) with x strictly within (0, 1), so that nothing is clamped but noise."""
    generator = torch.Generator().manual_seed(3)
    x = 0.1 + 0.8 * torch.rand(n, 2, 3, generator=generator, dtype=dtype)
    return TensorDataset(x, torch.arange(n) % CLASSES)


def inputs(dataset, **kwargs):
    return torch.cat([x for x, _ in DataLoader(dataset, batch_size=7, **kwargs)])


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 0.6, 1.0])
def test_symmetric_labels_are_wrong_at_exactly_the_rate_and_every_other_class_is_drawn(rate):
    noisy = symmetric_labels(LABEL, rate, CLASSES, seed=0)
    wrong = noisy != LABEL
    assert wrong.sum() == rate * 1000
    assert noisy.dtype == torch.int64
    assert 0 <= noisy.min() <= noisy.max() < CLASSES
    if rate:
        shifts = ((noisy - LABEL) % CLASSES)[wrong].bincount(minlength=CLASSES)
        assert shifts[0] == 0
        assert (shifts[1:] / wrong.sum() - 0.25).abs().max() < 0.06


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 1.0])
def test_asymmetric_labels_are_wrong_at_exactly_the_rate_in_every_class(rate):
    label = torch.cat([torch.full((10 * (c + 1),), c) for c in range(CLASSES)])
    noisy = asymmetric_labels(label, rate, CLASSES, seed=0)
    for c in range(CLASSES):
        given = noisy[label == c]
        assert (given == (c + 1) % CLASSES).sum() == rate * 10 * (c + 1)
        assert ((given == c) | (given == (c + 1) % CLASSES)).all()


def test_asymmetric_labels_may_name_what_is_taken_for_what():
    label = torch.arange(10).repeat_interleave(10)
    noisy = asymmetric_labels(label, 0.4, 10, seed=0, becomes=CIFAR10_ASYMMETRIC)
    # truck, bird, deer, cat and dog, in the order of torchvision's classes
    assert {(int(a), int(b)) for a, b in zip(label, noisy, strict=True) if a != b} == {
        (9, 1),
        (2, 0),
        (4, 7),
        (3, 5),
        (5, 3),
    }
    assert (noisy != label).sum() == 5 * 4
    for becomes in ({0: 0}, {0: 10}, {-1: 2}):
        with pytest.raises(ValueError, match="Expected becomes to name for classes from 0 to 9 another one each, but"):
            asymmetric_labels(label, 0.4, 10, seed=0, becomes=becomes)


@pytest.mark.parametrize(
    "of", [list, np.array, lambda y: torch.tensor(y, dtype=torch.uint8)], ids=["list", "numpy", "bytes"]
)
def test_labels_may_be_what_data_sets_have(of):
    label, transition = LABEL.tolist(), torch.full((CLASSES, CLASSES), 0.2)
    assert symmetric_labels(of(label), 0.4, CLASSES, seed=0).equal(symmetric_labels(LABEL, 0.4, CLASSES, seed=0))
    assert asymmetric_labels(of(label), 0.4, CLASSES, seed=0).equal(asymmetric_labels(LABEL, 0.4, CLASSES, seed=0))
    assert matrix_labels(of(label), transition.tolist(), seed=0).equal(matrix_labels(LABEL, transition, seed=0))
    noisy = NoisyLabels([("x", 7, "file")] * 1000, of(label), of([0] * 1000))
    assert noisy.is_wrong.equal(LABEL != 0)
    assert noisy[3] == ("x", 3, "file")


@pytest.mark.parametrize("label", [LABEL.float(), torch.eye(5).long()], ids=["floats", "one-hot"])
def test_labels_that_are_no_integers_are_refused(label):
    with pytest.raises(TypeError, match=r"one integer class per sample, \(N,\), but got (float32|int64) of shape"):
        symmetric_labels(label, 0.4, CLASSES, seed=0)


def test_a_rate_between_two_samples_is_rounded():
    assert (symmetric_labels(torch.zeros(7).long(), 0.5, 2, seed=0) == 1).sum() == 4
    assert (asymmetric_labels(torch.zeros(7).long(), 0.3, 2, seed=0) == 1).sum() == 2


def test_matrix_labels_have_the_frequencies_of_their_row():
    transition = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.5, 0.25, 0.25]])
    label = torch.arange(30_000) % 3
    noisy = matrix_labels(label, transition, seed=0)
    drawn = torch.stack([noisy[label == c].bincount(minlength=3) for c in range(3)]) / 10_000
    assert (drawn - transition).abs().max() < 0.02  # four standard errors
    assert (noisy[label == 1] == 1).all()


@pytest.mark.parametrize(
    "draw",
    [
        lambda seed: symmetric_labels(LABEL, 0.4, CLASSES, seed=seed),
        lambda seed: asymmetric_labels(LABEL, 0.4, CLASSES, seed=seed),
        lambda seed: matrix_labels(LABEL, torch.full((CLASSES, CLASSES), 0.2), seed=seed),
    ],
    ids=["symmetric", "asymmetric", "matrix"],
)
def test_labels_follow_the_seed_and_nothing_else(draw):
    before, state = LABEL.clone(), torch.get_rng_state()
    first = draw(1)
    torch.manual_seed(99)
    assert draw(1).equal(first)
    assert not draw(2).equal(first)
    assert LABEL.equal(before)
    torch.set_rng_state(state)
    draw(3)
    assert torch.get_rng_state().equal(state)


def test_no_labels_stay_no_labels():
    none = torch.zeros(0, dtype=torch.int64)
    assert symmetric_labels(none, 0.4, 3, seed=0).shape == (0,)
    assert asymmetric_labels(none, 0.4, 3, seed=0).shape == (0,)
    assert matrix_labels(none, torch.eye(3), seed=0).shape == (0,)


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("noise", [symmetric_labels, asymmetric_labels])
def test_a_rate_that_is_no_share_is_refused(noise, rate):
    with pytest.raises(ValueError, match=rf"Expected rate to lie in \[0, 1\], but got {rate}"):
        noise(LABEL, rate, CLASSES, seed=0)


@pytest.mark.parametrize("wrong", [-1, CLASSES])
def test_a_label_that_is_no_class_is_refused(wrong):
    label = torch.tensor([0, wrong])
    message = rf"Expected labels from 0 to 4, but they span {min(0, wrong)} to {max(0, wrong)}"
    with pytest.raises(ValueError, match=message):
        symmetric_labels(label, 0.4, CLASSES, seed=0)
    with pytest.raises(ValueError, match=message):
        asymmetric_labels(label, 0.4, CLASSES, seed=0)
    with pytest.raises(ValueError, match=message):
        matrix_labels(label, torch.eye(CLASSES), seed=0)


def test_other_labels_need_another_class():
    with pytest.raises(ValueError, match="Expected at least 2 classes, but got 1"):
        symmetric_labels(torch.zeros(4).long(), 0.5, 1, seed=0)
    with pytest.raises(ValueError, match="Expected at least 2 classes, but got 1"):
        asymmetric_labels(torch.zeros(4).long(), 0.5, 1, seed=0)


@pytest.mark.parametrize(
    "transition",
    [
        torch.full((2, 3), 1 / 3),
        torch.tensor([1.0]),
        torch.tensor([[1.5, -0.5], [0.0, 1.0]]),
        torch.full((2, 2), 0.4),
        torch.full((2, 2), torch.nan),
    ],
    ids=["not square", "no matrix", "negative", "sums to .8", "NaN"],
)
def test_a_matrix_that_is_not_one_of_probabilities_is_refused(transition):
    with pytest.raises(ValueError, match=r"matrix \(C, C\) of probabilities whose rows sum to 1, but got shape"):
        matrix_labels(torch.tensor([0, 1]), transition, seed=0)


def test_noisy_labels_change_the_label_and_know_where():
    clean = images()
    given = symmetric_labels(clean.tensors[1], 0.4, CLASSES, seed=0)
    noisy = NoisyLabels(clean, given_label=given, true_label=clean.tensors[1])
    assert len(noisy) == 40
    assert noisy.is_wrong.equal(torch.tensor([noisy[i][1] != int(clean[i][1]) for i in range(40)]))
    assert noisy.is_wrong.sum() == 16
    assert all(noisy[i][0].equal(clean[i][0]) for i in range(40))


def test_noisy_labels_need_a_label_of_each_kind_per_item():
    message = "Expected one label per item, but there are 40 items, {} given and {} true labels"
    with pytest.raises(ValueError, match=message.format(39, 40)):
        NoisyLabels(images(), given_label=torch.zeros(39), true_label=torch.zeros(40))
    with pytest.raises(ValueError, match=message.format(40, 41)):
        NoisyLabels(images(), given_label=torch.zeros(40), true_label=torch.zeros(41))


@pytest.mark.parametrize("limits", [None, (0.0, 1.0)])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_exactly_the_share_is_corrupted_and_the_mask_is_the_real_difference(share, limits):
    clean = images()
    noisy = GaussianInputs(clean, sigma=0.5, share=share, seed=0, limits=limits)
    changed = (inputs(noisy) != clean.tensors[0]).flatten(1).any(dim=1)
    assert noisy.is_corrupted.equal(changed)
    assert changed.sum() == share * 40
    assert [int(y) for _, y in noisy] == clean.tensors[1].tolist()


def test_the_noise_is_gaussian_of_the_stated_width_and_differs_between_items():
    clean = TensorDataset(torch.zeros(4, 5000), torch.zeros(4))
    added = inputs(GaussianInputs(clean, sigma=4.5, share=1.0, seed=0, limits=None))
    assert added.mean().item() == pytest.approx(0, abs=0.2)
    assert added.std().item() == pytest.approx(4.5, rel=0.05)
    assert torch.corrcoef(added).triu(1).abs().max() < 0.06


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_all_inputs_are_clamped_whether_corrupted_or_not(share):
    x = torch.tensor([[-1.0, 0.5, 2.0]]).repeat(20, 1)
    seen = inputs(GaussianInputs(TensorDataset(x, torch.zeros(20)), sigma=4.5, share=share, seed=0))
    assert seen.min() == 0
    assert seen.max() == 1
    assert (seen.min(dim=1).values >= 0).all()


def test_the_papers_protocol_gives_its_corrupted_inputs_away():
    x = torch.tensor([[-1.0, 0.5, 2.0]]).repeat(20, 1)
    noisy = PaperImageNoise(TensorDataset(x, torch.zeros(20)), seed=0)
    assert noisy.is_corrupted.sum() == 10
    seen = inputs(noisy)
    assert (seen.min(dim=1).values >= 0).equal(noisy.is_corrupted)
    assert seen[~noisy.is_corrupted].equal(x[~noisy.is_corrupted])
    assert seen.max() == 2
    assert seen[noisy.is_corrupted].max() == 1


def test_the_papers_noise_on_mfccs_has_no_limits():
    x = torch.randn(20, 40, 50)
    noisy = PaperMfccNoise(TensorDataset(x, torch.zeros(20)), seed=0)
    added = inputs(noisy) - x
    assert (added.flatten(1).abs().amax(dim=1) > 0).equal(noisy.is_corrupted)
    assert added[noisy.is_corrupted].std().item() == pytest.approx(15, rel=0.02)


def test_the_noise_stays_the_same_over_epochs_workers_and_orders():
    noisy = GaussianInputs(images(), sigma=1.0, share=0.5, seed=0)
    first = inputs(noisy)
    torch.manual_seed(99)
    assert inputs(noisy).equal(first)
    assert inputs(noisy, num_workers=2).equal(first)
    order = torch.randperm(40).tolist()
    assert inputs(noisy, sampler=order).equal(first[order])


def test_another_seed_corrupts_other_items_in_another_way():
    one, same, other = (GaussianInputs(images(), sigma=1.0, share=0.5, seed=seed) for seed in (0, 0, 1))
    assert inputs(one).equal(inputs(same))
    assert not one.is_corrupted.equal(other.is_corrupted)
    both = int((one.is_corrupted & other.is_corrupted).nonzero()[0])
    assert not one[both][0].equal(other[both][0])


def test_a_tensor_is_an_index_and_negative_ones_count_from_the_end():
    clean = images()
    noisy = GaussianInputs(clean, sigma=1.0, share=1.0, seed=0)
    labels = NoisyLabels(clean, given_label=clean.tensors[1].flip(0), true_label=clean.tensors[1])
    for dataset in (noisy, labels):
        assert dataset[torch.tensor(3)][0].equal(dataset[3][0])
        assert dataset[-1][0].equal(dataset[39][0])
        assert dataset[-1][1] == dataset[39][1]


def test_the_dtype_and_further_parts_of_an_item_are_kept():
    noisy = GaussianInputs([(torch.zeros(3, dtype=torch.float64), 1, "name")], sigma=1.0, share=1.0, seed=0)
    x, *rest = noisy[0]
    assert x.dtype == torch.float64
    assert rest == [1, "name"]


@pytest.mark.parametrize("labels_outside", [True, False])
def test_wrong_labels_and_corrupted_inputs_compose(labels_outside):
    clean = images()
    true = clean.tensors[1]
    given = asymmetric_labels(true, 0.5, CLASSES, seed=1)
    if labels_outside:
        corrupted = GaussianInputs(clean, sigma=1.0, share=0.5, seed=2)
        both = wrong = NoisyLabels(corrupted, given_label=given, true_label=true)
    else:
        wrong = NoisyLabels(clean, given_label=given, true_label=true)
        both = corrupted = GaussianInputs(wrong, sigma=1.0, share=0.5, seed=2)
    batches = list(DataLoader(both, batch_size=16, num_workers=2))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert y.equal(given)
    assert (y != true).equal(wrong.is_wrong)
    assert (x != clean.tensors[0]).flatten(1).any(dim=1).equal(corrupted.is_corrupted)


@pytest.mark.parametrize(
    ("sigma", "share"), [(-1.0, 0.5), (math.nan, 0.5), (math.inf, 0.5), (1.0, -0.1), (1.0, 1.1), (1.0, math.nan)]
)
def test_noise_that_makes_no_sense_is_refused(sigma, share):
    with pytest.raises(ValueError, match=r"Expected (sigma to be .*at least 0|share to lie in \[0, 1\]), but got"):
        GaussianInputs(images(), sigma=sigma, share=share, seed=0)


def test_limits_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"Expected limits \(lowest, highest\), but got \(1, 0\)"):
        GaussianInputs(images(), sigma=1.0, share=0.5, seed=0, limits=(1, 0))


@pytest.mark.parametrize(
    ("x", "kind"), [(torch.zeros(1, 3).byte(), "a tensor of torch.uint8"), (np.zeros((1, 3)), "a ndarray")]
)
def test_an_item_that_is_no_float_tensor_is_refused(x, kind):
    for noisy in (
        GaussianInputs([(x, 0)], sigma=1.0, share=0.0, seed=0),
        NoiseAtSnr([(x, 16000)], snr_db=0.0, share=0.0, seed=0),
    ):
        with pytest.raises(TypeError, match=f"Expected item 0 to start with a float tensor, but got {kind}; make one"):
            noisy[0]


@pytest.mark.parametrize("seed", [0, 1, np.int64(3), -1, 2**50])
def test_a_seed_chooses_other_items_for_noise_than_for_labels_and_splits(seed):
    corrupted = GaussianInputs(TensorDataset(torch.zeros(1000, 1)), sigma=1.0, share=0.4, seed=seed).is_corrupted
    wrong = symmetric_labels(LABEL, 0.4, CLASSES, seed=int(seed)) != LABEL
    # By chance 160, give or take 10; the same ones would be 400.
    assert (corrupted & wrong).sum().item() == pytest.approx(160, abs=40)


def sounds(n=6, length=4000):
    generator = torch.Generator().manual_seed(5)
    loudness = 10.0 ** -torch.arange(n)
    return [(loudness[i] * torch.randn(1, length, generator=generator), 16000, f"word {i}") for i in range(n)]


def power_ratio_db(clean, noisy):
    return 10 * math.log10(clean.square().mean() / (noisy - clean).square().mean())


@pytest.mark.parametrize(
    "background", [None, torch.sin(torch.arange(900.0)), torch.randn(9000)], ids=["white", "short", "long"]
)
@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
def test_noise_under_a_sound_has_the_stated_ratio_however_loud_the_sound_is(snr_db, background):
    clean = sounds()
    noisy = NoiseAtSnr(clean, snr_db=snr_db, share=0.5, seed=0, background=background)
    assert noisy.is_corrupted.sum() == 3
    for (x, rate, word), (y, *rest), is_corrupted in zip(clean, noisy, noisy.is_corrupted, strict=True):
        assert rest == [rate, word]
        assert y.dtype == x.dtype
        if is_corrupted:
            assert power_ratio_db(x, y) == pytest.approx(snr_db, abs=0.1)
        else:
            assert y.equal(x)


def test_noise_under_a_sound_stays_the_same_over_epochs_and_workers_and_follows_the_seed():
    def heard(seed, **loader):
        noisy = NoiseAtSnr(
            sounds(),
            snr_db=0.0,
            share=1.0,
            seed=seed,
            background=torch.randn(9000, generator=torch.Generator().manual_seed(1)),
        )
        return torch.cat([x for x, _, _ in DataLoader(noisy, batch_size=3, **loader)])

    first = heard(0)
    torch.manual_seed(99)
    assert heard(0).equal(first)
    assert heard(0, num_workers=1).equal(first)
    assert not heard(1).equal(first)
    stretches = first - torch.cat([x for x, _, _ in DataLoader(sounds(), batch_size=3)])
    assert torch.corrcoef(stretches.squeeze(1)).triu(1).abs().max() < 0.2, "the same stretch of the background"


def test_no_stretch_of_a_background_is_silent():
    background = torch.cat([torch.zeros(5000), torch.ones(1)])
    noisy = NoiseAtSnr([(torch.ones(1, 10), 16000)] * 20, snr_db=0.0, share=1.0, seed=0, background=background)
    assert all(x.isfinite().all() and not x.equal(torch.ones(1, 10)) for x, _ in noisy)


def test_a_silent_sound_stays_silent():
    silence = torch.zeros(1, 100)
    assert NoiseAtSnr([(silence, 8000, "")], snr_db=0.0, share=1.0, seed=0)[0][0].equal(silence)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snr_db": math.nan}, "Expected snr_db to be a finite number, but got nan"),
        ({"share": 1.5}, r"Expected share to lie in \[0, 1\], but got 1.5"),
        ({"seed": True}, "Expected seed to be a whole number"),
        ({"background": torch.zeros(1, 5)}, r"one channel of samples \(T',\), but got shape \(1, 5\); take one"),
        ({"background": torch.zeros(0)}, "one channel of samples"),
        ({"background": torch.zeros(5)}, "Expected background to be heard, but it is silent"),
        ({"background": torch.full((5,), math.nan)}, "or has samples that are not finite"),
    ],
)
def test_noise_under_a_sound_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        NoiseAtSnr(sounds(), **({"snr_db": 0.0, "share": 0.5, "seed": 0} | changes))


def test_noise_under_a_sound_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    with pytest.raises(ImportError, match=r"NoiseAtSnr needs torchaudio: pip install torchaudio"):
        NoiseAtSnr(sounds(), snr_db=0.0, share=0.5, seed=0)


CLEAN, WORSE, RANDOM = np.array([3, 5, 0, 1]), np.array([3, 4, 0, 9]), np.array([3, 5, 0, 2], dtype=np.uint8)


def as_authors(file, **names):
    """As the authors' file is: arrays by name in torch's archive, written with numpy 1."""
    torch.save(names, file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.mark.parametrize(
    "save", [as_authors, lambda file, **x: torch.save(x, file), np.savez], ids=["authors", "numpy 2", "npz"]
)
def test_human_labels_are_read_from_the_authors_file_and_its_likes(tmp_path, save):
    file = tmp_path / ("labels.npz" if save is np.savez else "CIFAR-10_human.pt")
    save(file, clean_label=CLEAN, worse_label=WORSE, random_label1=RANDOM)
    given, true = human_labels(file)
    assert given.equal(torch.tensor([3, 4, 0, 9]))
    assert true.equal(torch.tensor([3, 5, 0, 1]))
    assert given.dtype == true.dtype == torch.int64
    assert human_labels(str(file), "random_label1")[0].equal(torch.tensor([3, 5, 0, 2]))
    with pytest.raises(
        ValueError, match=r"labels named 'aggre_label' in .*holds \['clean_label', 'random_label1', 'worse"
    ):
        human_labels(file, "aggre_label")


def test_files_that_are_not_of_human_labels_are_refused_and_nothing_in_them_runs(tmp_path):
    file = tmp_path / "CIFAR-10_human.pt"
    with pytest.raises(FileNotFoundError):
        human_labels(file)
    torch.save({"clean_label": CLEAN, "worse_label": WORSE[:2]}, file)
    with pytest.raises(
        ValueError, match=r"one label per image .* 'worse_label' has shape \(2,\) and 'clean_label' \(4,\)"
    ):
        human_labels(file)
    torch.save([CLEAN], file)
    with pytest.raises(ValueError, match="hold arrays by name, as CIFAR-N's, but it holds a list"):
        human_labels(file)
    torch.save({"clean_label": Fraction(1, 2)}, file)  # a class of its own may do anything when it is unpickled
    with pytest.raises(ValueError, match="holds something else, or is cut short"):
        human_labels(file)
    for name in ("CIFAR-10_human.pt", "CIFAR-10_human.npz"):
        (tmp_path / name).write_bytes(b"<html>404</html>")
        with pytest.raises(ValueError, match="holds something else, or is cut short"):
            human_labels(tmp_path / name)
    np.savez(tmp_path / "names.npz", clean_label=["cat"], worse_label=["dog"])
    with pytest.raises(ValueError, match=r"Expected integers under 'worse_label' in .*, but they are of type <U3"):
        human_labels(tmp_path / "names.npz")
