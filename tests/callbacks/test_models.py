"""Real models in a short fit of all three callbacks: what is found, what is read, and what is left alone."""

from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from lightning_unlearn import AttributionPartitionCallback, DataFormat
from lightning_unlearn.attribution import resolve_layer
from tests.toys import Blobs, Toy, assert_same_weights, auroc, fit, partition_callback, weights
from tests.toys import quick_trio as trio

torchvision = pytest.importorskip("torchvision")


class BeforeSwap(L.Callback):
    """The weights when the epochs on all the data are over."""

    def __init__(self, at):
        self.at = at

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.at - 1:
            self.weights = weights(pl_module)


def data_of(shape, size=64):
    """Blobs whose samples have another shape."""
    blobs = Blobs(size)
    generator = torch.Generator().manual_seed(1)
    center = 2 * torch.randn(4, *shape, generator=generator)
    blobs.x = center[blobs.clean] + torch.randn(size, *shape, generator=generator)
    return blobs


def loader_of(blobs, **kwargs):
    return DataLoader(blobs, batch_size=32, shuffle=True, **kwargs)


def repair(make, loader, *, at=3, prune=None, finetune=None, **partition):
    """Fits with all three callbacks, and without them to the end of the warm-up, which must come out the same.

    Neurons are pruned in any case, so that zeros can be looked for.

    Returns:
        the module and the three callbacks.
    """
    prune = {"criterion": "magnitude", "max_val_drop": None, **(prune or {})}
    callbacks, moment, module = trio(at, prune=prune, finetune=finetune, **partition), BeforeSwap(at), make()
    fit(module, loader, [*callbacks, moment], max_epochs=at + 1)
    alone = make()
    fit(alone, loader, max_epochs=at)
    assert_same_weights(moment.weights, weights(alone))
    return module, *callbacks


def assert_repaired(module, partition, prune, finetune, *, head, reads=True, wrong=None, least=0.7):
    """All of it happened.

    Args:
        head: dotted path of the head that must have been found.
        reads: whether label evidence came from the training steps.
        wrong: (N,) bool, the planted wrong labels.
        least: by what AUROC they must be told apart.
    """
    found = partition.partition
    assert found.layer == f"input of '{head}'"
    assert found.clean_probability.isfinite().all()
    assert bool(partition.collector.reader.reason) != reads, partition.collector.reader.reason
    assert partition.collector.epochs_seen == list(range(1, partition.at_epoch + 1))
    assert auroc(found.clean_probability, ~wrong) > least
    assert finetune.is_active
    pruned = prune.mask.pruned_indices()
    assert len(pruned) > 0
    for entry in prune._state.sites[0].entries(module, pruned):
        assert (entry.parameter.index_select(entry.dimension, pruned) == 0).all()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def adam(module, lr=1e-2):
    return torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=lr)


def resnet():
    models = torchvision.models
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)


def vit():
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4
    )


class TimmStyle(nn.Module):
    """Features and head apart, as timm has them: global pooling, then dropout, then ``fc``."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(inplace=True))
        self.blocks = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.SiLU(inplace=True))
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.head_drop = nn.Dropout(0.1)
        self.fc = nn.Linear(16, 4)

    def forward_features(self, x):
        return self.blocks(self.stem(x))

    def forward_head(self, x, pre_logits=False):
        x = self.head_drop(self.global_pool(x).flatten(1))
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def audio():
    """A raw-waveform network of 1-D convolutions with a long stride at the start."""
    return nn.Sequential(
        nn.Conv1d(1, 12, 16, stride=4),
        nn.BatchNorm1d(12),
        nn.ReLU(inplace=True),
        nn.MaxPool1d(2),
        nn.Conv1d(12, 16, 3),
        nn.BatchNorm1d(16),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def table():
    """What is usual for tables: norm of the inputs, wide layers, dropout."""
    return nn.Sequential(
        nn.BatchNorm1d(16),
        nn.Linear(16, 48),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(48, 24),
        nn.GELU(),
        nn.Linear(24, 4),
    )


def inplace():
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 20), nn.LeakyReLU(inplace=True), nn.Linear(20, 4)
    )


class Frozen(nn.Module):
    """A backbone that is not trained, called without gradients, under a new head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.backbone.requires_grad_(False)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x)


class Adapter(nn.Module):
    """A frozen Linear with a low-rank one beside it, as LoRA adds it."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def lora():
    return nn.Sequential(Adapter(nn.Linear(16, 32)), nn.ReLU(), Adapter(nn.Linear(32, 20)), nn.ReLU(), nn.Linear(20, 4))


class Checkpointed(nn.Module):
    """Recomputes its body in the backward pass."""

    def __init__(self, use_reentrant, covers):
        super().__init__()
        self.use_reentrant, self.covers = use_reentrant, covers
        self.stem = nn.Linear(16, 32)
        self.body = nn.Sequential(nn.ReLU(), nn.Linear(32, 20), nn.ReLU())
        self.head = nn.Linear(20, 4)

    def forward(self, x):
        x = self.stem(x)
        if self.covers == "nothing":
            return self.head(self.body(x))
        inside = self.body if self.covers == "body" else lambda h: self.head(self.body(h))
        x = checkpoint(inside, x, use_reentrant=self.use_reentrant)
        return self.head(x) if self.covers == "body" else x


class InDict(Toy):
    """Returns a dict, as many detection and multi-task code bases do."""

    def forward(self, x):
        return {"logits": self.net(x), "aux": x.mean()}

    def training_step(self, batch):
        return cross_entropy(self(batch[0])["logits"], batch[1])

    def validation_step(self, batch):
        return None


class Sentences(Dataset):
    """Token ids of different lengths; a class has its own words, and some labels are wrong."""

    def __init__(self, size=64):
        self.blobs = Blobs(size)
        generator = torch.Generator().manual_seed(2)
        lengths = torch.randint(3, 9, (size,), generator=generator)
        self.ids = [
            1 + 5 * c + torch.randint(0, 5, (n,), generator=generator)
            for c, n in zip(self.blobs.clean.tolist(), lengths.tolist(), strict=True)
        ]
        self.wrong = self.blobs.wrong

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.blobs.y[index]}


def pad(samples):
    ids = pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": torch.stack([sample["labels"] for sample in samples]),
    }


class TextNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(21, 16, padding_idx=0)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.classifier = nn.Linear(16, 4)

    def forward(self, input_ids, attention_mask, labels=None):
        hidden = self.encoder(self.embeddings(input_ids), src_key_padding_mask=attention_mask == 0)
        mask = attention_mask.unsqueeze(2)
        logits = self.classifier((hidden * mask).sum(dim=1) / mask.sum(dim=1))
        loss = None if labels is None else cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


class TextClassifier(Toy):
    """Hugging Face's manner: the batch is a dict, the model's output an object with loss and logits."""

    def forward(self, input_ids, attention_mask, labels=None):
        return self.net(input_ids, attention_mask, labels)

    def training_step(self, batch):
        return self(**batch).loss

    def validation_step(self, batch):
        return None


def without_labels(batch):
    return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]


IMAGES, WAVES, TABLE = data_of((3, 16, 16)), data_of((1, 96)), Blobs(64)
MODELS = {
    "ResNet": (lambda: Toy(resnet, partial(adam, lr=3e-3)), IMAGES, "net.fc", {"at": 2}),
    "ViT": (lambda: Toy(vit), IMAGES, "net.heads.head", {}),
    "timm-style": (lambda: Toy(TimmStyle, adam), IMAGES, "net.fc", {}),
    "1-D audio": (lambda: Toy(audio, adam), WAVES, "net.9", {}),
    "table": (lambda: Toy(table, adam), TABLE, "net.6", {}),
    "ReLU in place": (lambda: Toy(inplace), TABLE, "net.4", {}),
    "frozen backbone": (lambda: Toy(Frozen, adam), TABLE, "net.head", {}),
    "adapters": (lambda: Toy(lora, adam), TABLE, "net.4", {"at": 5}),
    "forward returns a dict": (lambda: InDict(inplace), TABLE, "net.4", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_all_three_work_and_the_warm_up_is_as_without_them(name):
    make, data, head, settings = MODELS[name]
    module, *callbacks = repair(make, loader_of(data), **settings)
    assert_repaired(module, *callbacks, head=head, wrong=data.wrong)


@pytest.mark.parametrize(
    "given", [{}, {"data": DataFormat(batch_to_xy=without_labels)}], ids=["as it is", "with batch_to_xy"]
)
def test_a_text_classifier_in_the_manner_of_hugging_face(given):
    data = Sentences()
    loader = loader_of(data, collate_fn=pad)
    repaired = repair(lambda: TextClassifier(TextNet, adam), loader, **given)
    assert_repaired(*repaired, head="net.classifier", wrong=data.wrong)


@pytest.mark.parametrize(
    ("make", "layer", "norm"),
    [(resnet, "net.layer2.0.conv1", "net.layer2.0.bn1"), (vit, "net.encoder.layers.encoder_layer_1.mlp.0", None)],
    ids=["ResNet", "ViT"],
)
def test_a_layer_inside_is_attributed_pruned_and_trained_from(make, layer, norm):
    module, partition, prune, finetune = repair(
        lambda: Toy(make), loader_of(IMAGES), at=2, layer=layer, prune={"layer": layer}, finetune={"mode": "layers"}
    )
    assert partition.partition.layer == f"output of '{layer}'"
    assert (prune._state.sites[0].layer, prune._state.sites[0].norm) == (layer, norm)
    assert (resolve_layer(module, layer).weight[prune.mask.pruned_indices()] == 0).all()
    trained = {n for n, _ in module.named_parameters()} - set(finetune._finetuning.frozen.parameters)
    assert f"{layer}.weight" in trained
    assert not any(name.startswith(("net.conv1", "net.conv_proj", "net.layer1")) for name in trained)


@pytest.mark.parametrize("freeze", [False, True], ids=["trained", "frozen"])
def test_what_the_user_has_frozen_stays_so(freeze):
    """Without a gradient of its own, and with norms whose statistics move or not as the user has it."""
    module, *callbacks = repair(
        lambda: Toy(Frozen, adam),
        loader_of(TABLE),
        finetune={"mode": "layers", "layers": ["net.head"]} if freeze else {},
    )
    assert {n for n, p in module.named_parameters() if p.requires_grad} == {"net.head.weight", "net.head.bias"}
    before = Toy(Frozen).net.backbone[0].weight
    kept = callbacks[1].mask.keep
    assert module.net.backbone[0].weight[kept].equal(before[kept])


def compiled_layer():
    net = inplace()
    net[2] = torch.compile(net[2], backend="eager")
    return net


@pytest.mark.parametrize("layer", ["net.2", "net.2._orig_mod"])
def test_a_compiled_layer_does_no_harm(layer):
    repaired = repair(lambda: Toy(compiled_layer), loader_of(TABLE), at=2, layer=layer, prune={"layer": layer})
    module, partition, prune, _ = repaired
    assert partition.partition.layer == "output of 'net.2'"
    assert (prune.mask.layer, partition.collector.reader.reason) == ("net.2", "")
    assert (module.net[2]._orig_mod.weight[prune.mask.pruned_indices()] == 0).all()


def test_a_compiled_network_is_read_in_passes():
    repaired = repair(
        lambda: Toy(lambda: torch.compile(inplace(), backend="eager")),
        loader_of(TABLE, drop_last=True),
        at=2,
        finetune={"mode": "layers", "layers": ["net.2", "net.4"]},
    )
    assert_repaired(*repaired, head="net.4", reads=False, wrong=TABLE.wrong)
    assert "or calls it compiled" in repaired[1].collector.reader.reason
    assert repaired[3]._finetuning.frozen.parameters == ["net.0.weight", "net.0.bias"]
    torch._dynamo.reset()


def test_a_compiled_lightning_module():
    module, callbacks = Toy(inplace), trio(2)
    fit(torch.compile(module, backend="eager"), loader_of(TABLE, drop_last=True), callbacks, max_epochs=3)
    assert callbacks[0].partition.layer == "input of 'net.4'"
    assert auroc(callbacks[0].partition.clean_probability, ~TABLE.wrong) > 0.7
    torch._dynamo.reset()


@pytest.mark.parametrize("covers", ["body", "head"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, covers):
    repaired = repair(
        lambda: Toy(lambda: Checkpointed(use_reentrant, covers)), loader_of(TABLE), prune={"criterion": "taylor"}
    )
    assert_repaired(*repaired, head="net.head", wrong=TABLE.wrong)


def test_the_papers_recipe_sees_through_activation_checkpointing():
    found = []
    for covers in ("nothing", "head"):
        callback = AttributionPartitionCallback(at_epoch=1, recipe="rlap")
        fit(Toy(lambda covers=covers: Checkpointed(True, covers)), loader_of(TABLE), [callback], max_epochs=2)
        found.append(callback.partition.clean_probability)
    assert found[0].equal(found[1])


def one_activation():
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(16, 20), relu, nn.Linear(20, 20), relu, nn.Linear(20, 4))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"layer": "net.backbone.0"},
            r"gradients of the logits to reach layer 'net\.backbone\.0', but forward does not",
        ),
        ({"layer": "net.0", "attribution_method": "deeplift"}, "calls each of its activation modules"),
    ],
    ids=["a layer inside no_grad", "an activation called twice"],
)
def test_what_cannot_be_attributed_is_refused_before_the_first_step(settings, match):
    module = Toy(one_activation if "attribution_method" in settings else Frozen)
    with pytest.raises(ValueError, match=match):
        fit(module, loader_of(TABLE), [partition_callback(at_epoch=2, **settings)])
    assert module.steps == 0
