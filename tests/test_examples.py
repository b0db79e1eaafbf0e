import ast
import csv
import difflib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from lightning_unlearn.cli import main

# Lightning too, whose logger keeps the stream that it first meets, which would be one of capsys.
for needed in ("lightning.pytorch", "sklearn.datasets", "torchvision", "torchaudio", "jsonargparse"):
    pytest.importorskip(needed)

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINER = EXAMPLES / "existing_trainer"
# What stands beside the index, and what of a sample the report shows.
KINDS = {
    "images": ("file", "image"),
    "speech": ("file", "audio"),
    "text": ("text", "text"),
    "tabular": ("row", "table"),
}
# Where --fast has put what it has made.
DATA = {
    "images": "data/images-fast",
    "speech": "data/speech-fast",
    "text": "data/docstrings-fast.csv",
    "tabular": "data/cancer.csv",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty one; what a script has made in it is there for the configuration of the same name."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture
def run_script(folder, monkeypatch, capsys):
    def run(script, *arguments):
        monkeypatch.chdir(folder)
        # Lightning puts the seed there for other processes; it is put back with the rest.
        monkeypatch.setenv("PL_GLOBAL_SEED", "0")
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


def check(name, shown, folder):
    """What a script of that name has said and written."""
    accuracy = re.search(r"after \d+ epochs: (\d\.\d+) without the callbacks, (\d\.\d+) with them", shown)
    assert all(0 < float(value) <= 1 for value in accuracy.groups())
    right, suspects, wrong = map(int, re.search(r"(\d+) of these (\d+) are truly wrong, of (\d+)", shown).groups())
    total = int(re.search(r"\d+ of (\d+) \w+ are suspect", shown)[1])
    # By chance it is the share of wrong labels.
    assert right > 1.5 * suspects * wrong / total
    column, kind = KINDS[name]
    out = folder / "runs" / name
    with (out / "suspects.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == suspects
    assert all(row[column] for row in rows)
    assert (out / "report.html").stat().st_size > 50_000
    cards = json.loads((out / "gallery.json").read_text(encoding="utf-8"))["samples"].values()
    assert {card["kind"] for card in cards} == {kind}
    return rows, list(cards)


def test_images_names_the_files_that_lie_in_the_wrong_folder(run_script, folder):
    rows, _ = check("images", run_script(EXAMPLES / "images" / "images.py", "--fast"), folder)
    misplaced = [row for row in rows if "-true-" in row["file"]]
    assert all((folder / row["file"]).parent.name == row["given_class"] for row in rows)
    suggested = [row["suggested_class"] == row["file"][-5] for row in misplaced]
    assert sum(suggested) > 0.9 * len(rows)


def test_speech_of_a_folder_per_word(run_script, folder):
    _, cards = check("speech", run_script(EXAMPLES / "speech" / "speech.py", "--fast"), folder)
    assert all(card["src"].startswith("data:audio/wav") for card in cards)


def test_speech_of_one_folder_with_the_words_in_the_names(run_script, folder, monkeypatch):
    flat = folder / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted((folder / DATA["speech"]).glob("a*/*.wav"))):
        (flat / f"{file.parent.name}_speaker{number % 3}_{number}.wav").write_bytes(file.read_bytes())
    names = runpy.run_path(str(EXAMPLES / "speech" / "speech.py"))
    words = names["Words"](str(flat), noise=0.0)
    words.setup("fit")
    assert words.classes == ["ai", "ao"]
    assert len(words.train_data) + len(words.val_data) == 50
    assert not words.is_wrong.any()
    sound, label = words.train_data[0]
    assert sound.shape == (1, names["RATE"])
    assert words.classes[label] == words.train_data.files[0].stem.partition("_")[0]


def test_text_of_installed_libraries_does_not_name_them(run_script, folder):
    check("text", run_script(EXAMPLES / "text" / "text.py", "--fast"), folder)
    with (folder / DATA["text"]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} == {"torch", "numpy", "scikit-learn", "lightning", "python"}
    assert not [row for row in rows if re.search("torch|numpy|sklearn|lightning", row["text"], re.IGNORECASE)]


def test_tabular_shows_rows_as_in_the_file(run_script, folder):
    rows, cards = check("tabular", run_script(EXAMPLES / "tabular" / "tabular.py", "--fast"), folder)
    with (folder / DATA["tabular"]).open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    shown, row = dict(cards[0]["rows"]), table[int(rows[0]["row"])]
    assert {name: float(row[name]) for name in shown} == pytest.approx(
        {k: float(v) for k, v in shown.items()}, rel=1e-3
    )


def test_a_stream_of_shards_is_told_apart_by_keys(run_script, folder, monkeypatch):
    monkeypatch.setitem(KINDS, "stream", ("key", "image"))
    rows, cards = check("stream", run_script(EXAMPLES / "stream" / "stream.py", "--fast"), folder)
    assert all(row["key"].startswith("digit-") for row in rows)
    assert {card["file"] for card in cards} <= {row["key"] for row in rows}


def test_labels_of_the_users_own_data_are_left_as_they_are(run_script):
    """And all that is said of what is truly wrong is left out."""
    shown = run_script(EXAMPLES / "tabular" / "tabular.py", "--fast", "--data", DATA["tabular"], "--out", "runs/own")
    assert "suspect" in shown
    assert "truly wrong" not in shown


@pytest.mark.parametrize("name", [*DATA, "digits"])
def test_a_configuration_runs_as_its_first_line_says(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    text = (EXAMPLES / "cli" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith(f"# lightning-unlearn fit --config examples/cli/{name}.yaml\n")
    monkeypatch.setattr(sys, "argv", ["lightning-unlearn"])  # beside arguments of the process, LightningCLI warns
    arguments = ["--trainer.max_epochs", "3", "--trainer.enable_progress_bar", "false"]
    if name in DATA:
        arguments += ["--data.data", DATA[name]]
    if name == "images":
        arguments += ["--data.size", "8"]
    main(["fit", "--config", str(EXAMPLES / "cli" / f"{name}.yaml"), *arguments])
    settings = yaml.safe_load(text)["trainer"]
    if "logger" in settings:
        logger = settings["logger"]["init_args"]
        (report,) = (folder / logger["save_dir"] / logger["name"]).glob("version_*/unlearn/report.html")
        assert report.read_text(encoding="utf-8").rstrip().endswith("</html>")


def body_of(script):
    """The lines after the docstring, which says what the script brought."""
    text = script.read_text(encoding="utf-8")
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]


def test_a_teams_script_gets_an_import_and_three_lines():
    diff = list(difflib.unified_diff(body_of(TRAINER / "before.py"), body_of(TRAINER / "after.py"), n=0, lineterm=""))
    changed = [line for line in diff if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert not [line for line in changed if line.startswith("-")]
    added = [line[1:].strip() for line in changed if line[1:].strip()]
    assert added[0].startswith("from lightning_unlearn import ")
    assert [line.partition("(")[0] for line in added[1:]] == [
        "AttributionPartitionCallback",
        "CleanSubsetFinetuneCallback",
        "UnlearnReport",
    ]


@pytest.mark.parametrize("script", ["before.py", "after.py"])
def test_a_teams_script_runs(script, run_script, folder):
    shown = run_script(TRAINER / script, "--fast")
    best, last = (float(value) for value in re.findall(r"Test accuracy of the \w+ epoch: (\d\.\d+)", shown))
    assert min(best, last) > 0.3
    reports = list((folder / "logs").glob("lightning_logs/version_*/unlearn/report.html"))
    assert len(reports) == (script == "after.py")
