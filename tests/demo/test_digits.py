import pytest
import torch

from lightning_unlearn.demo import DigitsClassifier, DigitsDataModule


def test_the_same_seed_gives_the_same_data_and_test_labels_are_right():
    first, second, other = DigitsDataModule(seed=1), DigitsDataModule(seed=1), DigitsDataModule(seed=2)
    for data in (first, second, other):
        data.setup()
    assert first.given_label.equal(second.given_label)
    assert not first.given_label.equal(other.given_label)
    assert len(first.train_data) == 1198
    assert (len(first.val_data), len(first.test_data)) == (200, 399)
    wrong = (first.given_label != first.true_label).float().mean()
    assert wrong == pytest.approx(0.4, abs=1e-3)
    clean = DigitsDataModule(seed=1, noise=0.0)
    clean.setup()
    assert clean.given_label.equal(first.true_label)
    for part in ("val_data", "test_data"):
        assert getattr(clean, part).tensors[1].equal(getattr(first, part).tensors[1])


def test_no_loader_hands_out_the_true_labels():
    data = DigitsDataModule(batch_size=2000)
    data.setup()
    (_, label), *_ = data.train_dataloader()
    assert label.sort().values.equal(data.given_label.sort().values)


def test_the_classifier_gives_logits():
    assert DigitsClassifier()(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
