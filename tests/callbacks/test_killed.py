"""A fit that is killed (SIGKILL) anywhere and resumed with ckpt_path="last" ends as one that never was.

From checkpoints at the end of epochs. Within an epoch Lightning itself does not resume exactly (see test_resume.py).
"""

import random
import signal

import pytest
import torch

from tests.callbacks import forked, kill_script, plain_script
from tests.callbacks.kill_script import VARIANTS
from tests.callbacks.snapshot import assert_same

FULL, LAYERS, OPTIMIZER, RELABEL, WEIGH = VARIANTS
POINTS = [
    # In warm-up, before the first checkpoint and after it.
    (FULL, "training step", 3, "before"),
    (LAYERS, "optimizer step", 9, "after"),
    (WEIGH, "reading a sample in a pass", 120, "before"),
    # In the pass at the end of warm-up, between partition and prune, in the guard, between prune and fine-tuning.
    (FULL, "reading a sample in a pass", 150, "before"),
    (RELABEL, "attributing a batch", 5, "after"),
    (FULL, "reporting the partition", 1, "before"),
    (LAYERS, "computing the partition", 1, "after"),
    (FULL, "pruning", 1, "before"),
    (LAYERS, "measuring in the guard", 2, "after"),
    (FULL, "holding at zero", 1, "before"),
    (WEIGH, "holding at zero", 2, "after"),
    (OPTIMIZER, "starting to fine-tune", 1, "before"),
    (LAYERS, "starting to fine-tune", 1, "after"),
    # In fine-tuning, and in a later round.
    (OPTIMIZER, "reading a training sample", 260, "before"),
    (RELABEL, "computing the partition", 2, "after"),
    (WEIGH, "validation step", 9, "before"),
    # While a checkpoint is written.
    (FULL, "making a checkpoint", 4, "before"),
    (RELABEL, "putting a checkpoint in its place", 5, "before"),
    (LAYERS, "putting a checkpoint in its place", 6, "after"),
]
RANDOM_POINTS = 2
"""Of each variant."""


@pytest.fixture(scope="module", autouse=True)
def _forks():
    forked.start()


def train(folder, variant, kill=None):
    folder.mkdir(exist_ok=True, parents=True)
    code = forked.run(kill_script.train, folder, variant, kill)
    assert code == (-signal.SIGKILL if kill else 0), (folder / "log.txt").read_text()[-3000:]
    return None if kill else torch.load(folder / "result.pt", weights_only=True)


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    """What a fit finds that is never killed."""
    found = {}

    def of(variant):
        if variant not in found:
            folder = tmp_path_factory.mktemp("unharmed")
            found[variant] = {**train(folder, variant), "last": folder / "checkpoints" / "last.ckpt"}
        return found[variant]

    return of


def without_fits(state):
    """A state but for where the fit was resumed, which it tells on purpose."""
    return {**state, "fits": [], "provenance": {**state["provenance"], "fits": []}}


def assert_ends_alike(resumed, unharmed):
    (first, *others), (whole, *expected) = resumed["states"], unharmed["states"]
    assert len(first["fits"]) >= len(whole["fits"]) == 1
    assert_same([without_fits(first), *others], [without_fits(whole), *expected], "states")
    for part in ("weights", "optimizer"):
        assert_same(resumed[part], unharmed[part], part)
    assert resumed["drawn"].items() <= unharmed["drawn"].items()


def test_a_fit_that_is_not_killed_does_what_is_to_be_tested(unharmed):
    for variant in VARIANTS:
        partition, prune, finetune = unharmed(variant)["states"]
        assert not partition["partition"]["is_clean"].all(), variant
        assert not prune["masks"][0]["keep"].all(), variant
        assert finetune["training_subset"] is not None, variant
        assert len(partition["rounds"]) == (3 if variant == RELABEL else 2 if variant == WEIGH else 1), variant
        if variant == RELABEL:
            assert (finetune["training_subset"]["new_label"] >= 0).any()


@pytest.mark.parametrize(("variant", "place", "call", "moment"), POINTS)
def test_killed_at(tmp_path, unharmed, variant, place, call, moment):
    train(tmp_path, variant, (place, call, moment))
    has_checkpoint = any((tmp_path / "checkpoints").glob("last*.ckpt"))
    resumed = train(tmp_path, variant)
    assert (0 in resumed["drawn"]) != has_checkpoint
    assert_ends_alike(resumed, unharmed(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random(tmp_path, unharmed, variant):
    draw = random.Random(list(VARIANTS).index(variant))
    for number in range(RANDOM_POINTS):
        place = draw.choice(sorted(unharmed(variant)["counts"]))
        point = (place, draw.randint(1, unharmed(variant)["counts"][place]), draw.choice(["before", "after"]))
        folder = tmp_path / str(number)
        train(folder, variant, point)
        assert_ends_alike(train(folder, variant), unharmed(variant))


def test_killed_again_and_again(tmp_path, unharmed):
    # In epoch 1 twice, at its end, in epoch 2, and in the one after it.
    for place, call in [("training step", 10), ("training step", 2), ("pruning", 1)] + [("training step", 9)] * 2:
        train(tmp_path, LAYERS, (place, call, "after"))
    assert_ends_alike(train(tmp_path, LAYERS), unharmed(LAYERS))


@pytest.mark.parametrize("variant", [FULL, LAYERS, RELABEL])
def test_where_the_package_is_not_installed_its_checkpoint_is_like_any_other(tmp_path, unharmed, variant):
    code = forked.run(plain_script.use, unharmed(variant)["last"], tmp_path / "result.pt")
    assert code == 0, (tmp_path / "log.txt").read_text()[-3000:]
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    assert_same(found["loaded"], unharmed(variant)["weights"])
    assert_same(found["resumed"], unharmed(variant)["weights"])
    assert found["epochs"] == kill_script.EPOCHS + 1
    assert found["val_loss"].isfinite()
    pruned = ~unharmed(variant)["states"][1]["masks"][0]["keep"]
    assert pruned.any()
    assert (found["loaded"]["net.4.weight"][pruned] == 0).all()
    assert (found["loaded"]["net.7.weight"][:, pruned] == 0).all()


def test_an_optimizer_of_some_layers_is_not_one_of_all_without_the_package(tmp_path, unharmed):
    assert forked.run(plain_script.use, unharmed(OPTIMIZER)["last"], tmp_path / "result.pt") == 1
    assert "parameter group that doesn't match the size" in (tmp_path / "log.txt").read_text()
