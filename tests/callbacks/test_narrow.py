"""Who only wants other training samples inside a fit gets them, and the loader is as it was afterwards."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, narrow
from tests.callbacks import forked
from tests.toys import Blobs, BlobsData, IndexRecorder, Toy, fit

SIZE = 50


class Narrow(L.Callback):
    """Calls narrow in one hook.

    Args:
        choose: from the epoch to the indices; ``"skip"`` for no call.
        hook: its name.
    """

    def __init__(self, choose, hook="on_train_epoch_start"):
        self.batches = []

        def call(trainer, *_):
            indices = choose(trainer.current_epoch)
            if not isinstance(indices, str):
                narrow(trainer, indices)
            self.batches.append(trainer.num_training_batches)

        setattr(self, hook, call)


def fitted(chooser, data=None, more=(), **kwargs):
    blobs = Blobs(SIZE)
    record = IndexRecorder(blobs)
    data = BlobsData(blobs, batch_size=8) if data is None else data(blobs)
    given = [chooser, record, *more]
    trainer = fit(Toy(), data, given, **{"max_epochs": 4, **kwargs})
    assert [one for one in trainer.callbacks if one in given] == given
    assert not any(type(one).__name__ == "_Narrowing" for one in trainer.callbacks)
    return record.by_epoch, trainer


def test_each_call_chooses_of_all_samples_and_lightning_counts_anew():
    chosen = [range(10, 30), "skip", [49, 3, 3 + 4], None]
    chooser = Narrow(lambda epoch: chosen[epoch])
    drawn, trainer = fitted(chooser)
    assert [sorted(drawn[epoch]) for epoch in range(4)] == [
        list(range(10, 30)),
        list(range(10, 30)),
        [3, 7, 49],
        list(range(SIZE)),
    ]
    assert drawn[0] != drawn[1]
    assert chooser.batches == [3, 3, 1, 7]
    # What the fit had is the user's again.
    assert sorted(trainer.train_dataloader.batch_sampler.sampler) == list(range(SIZE))


@pytest.mark.parametrize(
    "indices", [torch.tensor([2, 5, 40]), np.array([5, 2, 40]), {2, 5, 40}, (index for index in (40, 2, 5))]
)
def test_indices_of_any_kind(indices):
    drawn, _ = fitted(Narrow(lambda epoch: indices if epoch == 0 else "skip"), max_epochs=1)
    assert sorted(drawn[0]) == [2, 5, 40]


def test_at_the_end_of_an_epoch_it_holds_from_the_next_on():
    drawn, _ = fitted(Narrow(lambda epoch: range(8), "on_train_epoch_end"), max_epochs=2)
    assert (len(drawn[0]), sorted(drawn[1])) == (SIZE, list(range(8)))


def test_weights_of_a_sampler_hold_among_those_that_are_left():
    weight = torch.ones(SIZE)
    weight[:25] = 0

    def data(blobs):
        return DataLoader(
            TensorDataset(blobs.x, blobs.y), batch_size=8, sampler=WeightedRandomSampler(weight, 400, replacement=True)
        )

    drawn, _ = fitted(Narrow(lambda epoch: range(20, 30)), data, max_epochs=1)
    assert set(drawn[0]) == set(range(25, 30))
    assert len(drawn[0]) == 400 * 5 // 25


@pytest.mark.parametrize(
    ("indices", "error", "words"),
    [
        ([50], ValueError, r"Expected indices in \[0, 50\), the size of the training set, but got 50"),
        ([-1, 3], ValueError, "but got -1"),
        ([3, 4, 3], ValueError, "Expected each index once, but 3 is repeated"),
        ([0.5], TypeError, "integer positions in the training set, but got list"),
        (7, TypeError, "integer positions in the training set, but got int"),
        (torch.arange(50) < 20, TypeError, r"for a mask, pass mask\.nonzero"),
        ([], ValueError, "the 0 samples do not fill one batch"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(indices, error, words):
    with pytest.raises(error, match=words):
        fitted(Narrow(lambda epoch: indices))


def test_after_an_error_the_loader_draws_from_all():
    blobs = Blobs(SIZE)
    loader = DataLoader(blobs, batch_size=8, shuffle=True)
    sampler, batch_sampler = loader.sampler, loader.batch_sampler
    failing = Narrow(lambda epoch: range(10) if epoch == 0 else [99])
    with pytest.raises(ValueError, match="but got 99"):
        fit(Toy(), loader, [failing])
    assert loader.sampler is sampler
    assert loader.batch_sampler is batch_sampler
    assert batch_sampler.sampler is sampler


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end", "on_validation_epoch_end"])
def test_in_the_middle_of_an_epoch_and_outside_of_a_fit_it_is_refused(hook):
    with pytest.raises(MisconfigurationException, match="between two epochs of a fit; call it in on_train_start"):
        fitted(Narrow(lambda epoch: range(10), hook), num_sanity_val_steps=0)
    _, trainer = fitted(Narrow(lambda epoch: "skip"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="between two epochs of a fit"):
        narrow(trainer, range(10))


def test_beside_callbacks_that_it_would_disturb_it_is_refused():
    chooser = Narrow(lambda epoch: range(20) if epoch == 1 else "skip")
    with pytest.raises(MisconfigurationException, match="AttributionPartitionCallback is still collecting evidence"):
        fitted(chooser, more=[AttributionPartitionCallback(at_epoch=2)])
    both = [AttributionPartitionCallback(at_epoch=3), CleanSubsetFinetuneCallback()]
    with pytest.raises(MisconfigurationException, match="would both choose the training samples"):
        fitted(chooser, more=both)
    with pytest.raises(MisconfigurationException, match="narrow needs all the training data, but the Tr"):
        fitted(chooser, overfit_batches=2)


def test_what_a_partition_has_found_can_be_acted_on_by_hand():
    partition = AttributionPartitionCallback(at_epoch=2, recipe="label")
    chooser = Narrow(lambda epoch: partition.partition.clean_indices() if epoch >= 3 else "skip")
    drawn, _ = fitted(chooser, more=[partition])
    assert sorted(drawn[3]) == partition.partition.clean_indices().tolist()
    assert len(drawn[1]) == SIZE


def test_a_loader_that_is_made_again_with_other_samples_is_refused():
    class Growing(BlobsData):
        def train_dataloader(self):
            self.train = Blobs(SIZE + 5 * self.train_loaders_made)
            return super().train_dataloader()

    with pytest.raises(ValueError, match=r"of 50 samples .* reloaded loader has 55\. Call narrow again"):
        fitted(
            Narrow(lambda epoch: range(10) if epoch == 0 else "skip"),
            lambda blobs: Growing(blobs, batch_size=8),
            reload_dataloaders_every_n_epochs=1,
        )


@pytest.mark.parametrize("steps", [None, 9], ids=["at the end of an epoch", "in the middle of one"])
def test_a_fit_that_goes_on_draws_what_an_uninterrupted_one_draws(tmp_path, steps):
    def chooser():
        one = Narrow(lambda epoch: range(10 * epoch, 10 * epoch + 20))
        one.on_train_start = one.on_train_epoch_start
        return one

    def data(blobs):
        return BlobsData(blobs, batch_size=8, by_epoch=True)

    whole, _ = fitted(chooser(), data)
    every = {"every_n_epochs": 1, "save_on_train_epoch_end": True} if steps is None else {"every_n_train_steps": 4}
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}-{step}", **every)
    fitted(chooser(), data, [keep], enable_checkpointing=True, max_epochs=2)
    path = next(tmp_path.glob("epoch=0-step=3.ckpt" if steps is None else "epoch=1-step=4.ckpt"))
    rest, _ = fitted(chooser(), data, ckpt_path=path)
    assert rest[2] == whole[2]
    assert rest[3] == whole[3]
    if steps is None:
        assert rest[1] == whole[1]


def ranks_narrow(folder):
    """What each of two ranks draws; and that both refuse what one of them does not accept."""
    chooser = Narrow(lambda epoch: range(20, 31))
    drawn, trainer = fitted(chooser, devices=2, strategy="ddp", max_epochs=2)
    said = []
    for wrong in ([5, 5], range(10)):
        other = Narrow(lambda epoch, wrong=wrong: wrong if trainer.global_rank else range(11))
        try:
            fitted(other, devices=2, strategy="ddp", max_epochs=1)
        except ValueError as error:
            said.append(str(error))
    torch.save({"drawn": drawn, "said": said}, folder / f"{trainer.global_rank}.pt")


@pytest.mark.ddp
def test_two_ranks_share_the_samples_and_refuse_together(tmp_path):
    done = forked.launch(ranks_narrow, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for epoch in range(2):
        drawn = [rank["drawn"][epoch] for rank in ranks]
        assert [len(one) for one in drawn] == [6, 6]
        assert set(drawn[0] + drawn[1]) == set(range(20, 31))
    assert "invalid on another rank" in ranks[0]["said"][0]
    assert "5 is repeated" in ranks[1]["said"][0]
    assert all("the same indices on every rank, but they differ" in rank["said"][1] for rank in ranks)
