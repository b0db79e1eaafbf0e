"""Texts that a data set holds as token ids are shown in words."""

import functools

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_unlearn import AttributionPartitionCallback, UnlearnReport
from lightning_unlearn.report import RunRecord
from lightning_unlearn.report.samples import SampleView
from lightning_unlearn.report.tokens import decoded, find_tokenizer, token_ids

WORDS = ["[PAD]", "[CLS]", "good", "bad", "film", "[SEP]"]
IDS = [1, 2, 4, 5, 0, 0]


class Tokenizer:
    """As those of Hugging Face."""

    def decode(self, ids, skip_special_tokens=False):
        assert all(type(one) is int for one in ids)
        return " ".join(WORDS[one] for one in ids if not (skip_special_tokens and WORDS[one].startswith("[")))


class Plain:
    def decode(self, ids):
        return " ".join(WORDS[one] for one in ids)


class Collator:
    def __init__(self):
        self.tokenizer = Tokenizer()

    def __call__(self, batch):
        return batch

    def join(self, batch):
        return batch


class Autoencoder:
    def decode(self, latent):
        raise AssertionError("it is no tokenizer")


def collate(batch, tokenizer):
    return batch


@pytest.mark.parametrize(
    "holder",
    [Collator(), Collator().join, functools.partial(collate, tokenizer=Tokenizer()), functools.partial(Collator())],
)
def test_a_tokenizer_is_found_where_it_is_kept(holder):
    assert isinstance(find_tokenizer(None, Autoencoder(), holder), Tokenizer)
    assert find_tokenizer(Autoencoder(), len, None) is None


@pytest.mark.parametrize(
    ("content", "is_text", "ids"),
    [
        ({"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor([1, 1, 1, 1, 0, 0])}, False, IDS[:4]),
        ({"input_ids": IDS, "token_type_ids": [0] * 6}, False, IDS),
        ({"input_ids": torch.tensor([IDS])}, False, IDS),
        (torch.tensor(IDS), True, IDS),
        (torch.tensor(IDS), False, None),
        (torch.ones(6), True, None),
        ("good", True, None),
        ({"x": torch.tensor(IDS)}, True, None),
    ],
)
def test_ids_are_known_from_other_numbers(content, is_text, ids):
    assert token_ids(content, is_text=is_text) == ids


def test_they_are_shown_in_words_or_with_a_hint():
    sample = {"input_ids": IDS, "attention_mask": [1, 1, 1, 1, 0, 0], "labels": 3}
    assert SampleView().card(sample, 60_000, Tokenizer()) == {"kind": "text", "text": "good film"}
    assert decoded(Plain(), IDS[1:3]) == "good film"
    card = SampleView().card(sample, 60_000)
    assert card["kind"] == "table"
    assert card["note"].startswith("Token ids are shown as numbers")


class Texts(torch.utils.data.Dataset):
    """Of the first 20 of 120 the label is wrong."""

    def __len__(self):
        return 120

    def __getitem__(self, index):
        ids = torch.tensor([1, 2 + index % 2, 4, 5])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones(4, dtype=torch.int64),
            "labels": index % 2 ^ (index < 20),
        }


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.tokenizer = Tokenizer()
        self.embed, self.head = torch.nn.EmbeddingBag(6, 8), torch.nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embed(input_ids))

    def training_step(self, batch, batch_idx):
        logits = self(batch["input_ids"], batch["attention_mask"])
        return torch.nn.functional.cross_entropy(logits, batch["labels"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def test_a_fit_on_token_ids_has_words_in_its_report(tmp_path):
    L.seed_everything(0, verbose=False)
    callbacks = [AttributionPartitionCallback(at_epoch=3), UnlearnReport(tmp_path, samples=10)]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(Classifier(), DataLoader(Texts(), batch_size=10, shuffle=True))
    cards = RunRecord.load(tmp_path).gallery
    assert cards
    assert {card.get("text") for card in cards.values()} <= {"good film", "bad film"}
