"""The examples of the paper's two tasks, on small data in the layout that torchvision and torchaudio download."""

import hashlib
import pickle
import wave
import zipfile
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml

# The sdist has both; an installation without these extras has not.
pytest.importorskip("torchvision")
pytest.importorskip("torchaudio")
from torchvision.datasets import CIFAR10

from examples.cifar10 import cifar10
from examples.cifar10.cifar10 import MEAN, STD, Cifar10, PaperResNet18, mirrored_and_shifted
from examples.speech_commands import speech_commands
from examples.speech_commands.speech_commands import RATE, WORDS, PaperSpeechCnn, SpeechCommands
from lightning_unlearn import Partition
from lightning_unlearn.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
IMAGES = 300  # the paper's mixture wants more samples than neurons
SPEAKERS = 30


def batch_file(folder, name, total, first):
    """As CIFAR-10's python version; returns the file's checksum, as torchvision has it in its lists."""
    # At random: of images that repeat, whether the paper's mixture finds them singular is up to rounding.
    pixels = np.random.default_rng(first).integers(0, 251, (total, 3072), dtype=np.uint8)
    content = pickle.dumps({"data": pixels, "labels": [(first + i) % 10 for i in range(total)]})
    (folder / name).write_bytes(content)
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def cifar_folder(tmp_path, monkeypatch):
    folder = tmp_path / "images" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    train = [[f"data_batch_{i}", batch_file(folder, f"data_batch_{i}", IMAGES // 3, i)] for i in range(1, 4)]
    test = [["test_batch", batch_file(folder, "test_batch", 20, 3)]]
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()})
    return folder.parent


def wav(path, pitch, rate=RATE, seconds=0.5, width=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        sound.writeframes((8000 * tone).astype("<i2").tobytes() if width == 2 else bytes(100))


@pytest.fixture(scope="module")
def speech_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    clips = folder / "SpeechCommands" / "speech_commands_v0.02"
    for i, word in enumerate([*WORDS, "bed"]):
        for speaker in range(SPEAKERS):
            wav(clips / word / f"s{speaker}_nohash_0.wav", 200 + 100 * i + speaker)
    (clips / "validation_list.txt").write_text("yes/s4_nohash_0.wav\n")
    (clips / "testing_list.txt").write_text("".join(f"{word}/s5_nohash_0.wav\n" for word in [*WORDS, "bed"]))
    return folder


@pytest.fixture
def folder_of(cifar_folder, speech_folder):
    return {"cifar10": cifar_folder, "speech_commands": speech_folder}


def test_images_come_from_torchvisions_folder_in_its_order(cifar_folder):
    data = Cifar10(cifar_folder, batch_size=7)
    data.setup()
    expected = CIFAR10(cifar_folder)
    assert data.train_data.y.tolist() == expected.targets
    assert data.train_data.x.equal(torch.from_numpy(expected.data).permute(0, 3, 1, 2))
    assert not data.is_wrong.any()
    assert not data.is_corrupted.any()
    # By batches, as by items, and not in another type: pixels become floats on the device.
    x, y = data.train_data.__getitems__([3, 1])
    assert x[1].equal(data.train_data[1][0])
    assert y.tolist() == [expected.targets[3], expected.targets[1]]
    batch, _ = data.on_after_batch_transfer((x, y), 0)
    assert batch.allclose((x.float() / 255 - MEAN) / STD)


def test_a_second_setup_decodes_nothing(cifar_folder, monkeypatch):
    data = Cifar10(cifar_folder)
    data.setup()
    monkeypatch.setattr(cifar10, "read_images", None)
    rows = data.train_data
    data.setup("test")
    assert data.train_data is rows


def test_an_npz_holds_jpegs_and_what_people_called_them(tmp_path):
    file = cifar10.made_up(tmp_path / "made_up.npz", train=20, test=10)
    with np.load(file) as arrays:
        np.savez(file, **arrays, train_human_label=np.zeros(20, dtype=np.int64))
    data = Cifar10(file, train_size=12, test_size=10, labels="human", seed=1)
    data.setup()
    # Of a class is how bright it is, give or take JPEG.
    brightness = data.train_data.x.float().mean(dim=(1, 2, 3))
    assert ((brightness - 30 - 22 * data.true_label).abs() < 5).all()
    assert data.train_data.y.eq(0).all()
    assert data.is_wrong.equal(data.true_label != 0)
    assert len(data.test_data) == 10


def test_people_may_also_speak_from_a_file_of_their_own(cifar_folder, tmp_path):
    true = np.array(CIFAR10(cifar_folder).targets)
    np.savez(tmp_path / "human.npz", clean_label=true, worse_label=(true + 1) % 10)
    np.savez(tmp_path / "shuffled.npz", clean_label=true[::-1], worse_label=true)
    data = Cifar10(cifar_folder, labels="human", human_file=tmp_path / "human.npz")
    data.setup()
    assert data.is_wrong.all()
    with pytest.raises(ValueError, match=r"Expected .*shuffled\.npz to be of these images in torchvision's order"):
        Cifar10(cifar_folder, labels="human", human_file=tmp_path / "shuffled.npz").setup()
    with pytest.raises(ValueError, match=r"Expected human_file='\.\.\./CIFAR-10_human\.pt' for labels='human'"):
        Cifar10(cifar_folder, labels="human").setup()


@pytest.mark.parametrize("train_size", [IMAGES, IMAGES // 3])
def test_labels_are_wrong_at_the_rate_also_where_not_all_images_are_taken(cifar_folder, train_size):
    data = Cifar10(cifar_folder, labels="symmetric", rate=0.5, train_size=train_size)
    data.setup()
    assert data.is_wrong.sum() == train_size // 2
    assert data.is_wrong.equal(data.train_data.y != data.true_label)


def test_asymmetric_labels_are_those_of_the_literature(cifar_folder):
    data = Cifar10(cifar_folder, labels="asymmetric", rate=0.5)
    data.setup()
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    wrong = {(names[a], names[b]) for a, b in zip(data.true_label, data.train_data.y, strict=True) if a != b}
    assert wrong == {
        ("truck", "automobile"),
        ("bird", "airplane"),
        ("deer", "horse"),
        ("cat", "dog"),
        ("dog", "cat"),
    }
    assert data.is_wrong[data.true_label == 3].sum() == IMAGES // 10 // 2


def test_images_that_are_not_there_and_misspelt_noise_are_refused(cifar_folder, tmp_path):
    with pytest.raises(ValueError, match="to be one of clean, symmetric, asymmetric, human, but got 'symmetrical'"):
        Cifar10(cifar_folder, labels="symmetrical")
    with pytest.raises(ValueError, match="inputs to be one of clean, gaussian, paper, but got 'normal'"):
        Cifar10(cifar_folder, inputs="normal")
    with pytest.raises(ValueError, match=rf"Expected to take 1 to {IMAGES} images of .*, but was asked for 50,000"):
        Cifar10(cifar_folder, train_size=50_000).setup()
    with pytest.raises(ValueError, match=r"Expected to take 1 to 20 images of .*, but was asked for 0"):
        Cifar10(cifar_folder, test_size=0).setup()
    np.savez(tmp_path / "other.npz", train_label=[1], x=[2])
    with pytest.raises(ValueError, match=r"arrays train_jpeg, train_offsets in .*, but it holds train_label, x"):
        Cifar10(tmp_path / "other.npz").setup()


def test_the_papers_noise_gives_itself_away_and_the_fair_one_does_not(cifar_folder):
    noisy = {}
    for inputs in ("paper", "gaussian"):
        data = Cifar10(cifar_folder, inputs=inputs, share=0.5)
        data.setup()
        assert data.is_corrupted.sum() == IMAGES // 2
        x, _ = data.on_after_batch_transfer((data.train_data.x, data.train_data.y), 0)
        noisy[inputs] = x.amin(dim=(1, 2, 3)) >= -1e-5
        clean = data.train_data.x[~data.is_corrupted]
        pixels = clean if inputs == "gaussian" else (clean * 255).round()
        original = torch.from_numpy(CIFAR10(cifar_folder).data).permute(0, 3, 1, 2)
        assert pixels.float().equal(original[~data.is_corrupted].float())
    assert noisy["paper"].equal(data.is_corrupted)
    assert not noisy["gaussian"].any()


def test_augmentation_mirrors_and_shifts_whole_images():
    torch.manual_seed(0)
    x = torch.arange(1, 1 + 3 * 32 * 32).reshape(1, 3, 32, 32).float().expand(40, -1, -1, -1)
    found = mirrored_and_shifted(x)
    seen = set()
    for image in found:
        # Where the middle went says by how much, and the rest must have gone along.
        for mirrored in (False, True):
            source = x[0].flip(2) if mirrored else x[0]
            padded = torch.nn.functional.pad(source, (4, 4, 4, 4))
            places = [
                (mirrored, i, j)
                for i in range(9)
                for j in range(9)
                if padded[0, i + 16, j + 16] == image[0, 16, 16] and padded[:, i : i + 32, j : j + 32].equal(image)
            ]
            seen.update(places)
            if places:
                break
        else:
            pytest.fail("an image is not a shifted one")
    assert {mirrored for mirrored, _, _ in seen} == {False, True}
    assert len({(i, j) for _, i, j in seen}) > 10


def test_only_training_augments(cifar_folder):
    data = Cifar10(cifar_folder, augment=True)
    data.setup()
    batch = data.train_data.__getitems__(list(range(8)))
    plain, _ = data.on_after_batch_transfer(batch, 0)

    class Trainer:
        training = False

    data.trainer = Trainer()
    assert data.on_after_batch_transfer(batch, 0)[0].equal(plain)
    data.trainer.training = True
    assert not data.on_after_batch_transfer(batch, 0)[0].equal(plain)


def test_download_is_asked_of_the_libraries_once(cifar_folder, speech_folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(CIFAR10, "download", lambda self: asked.append(str(self.root)))
    monkeypatch.setattr(
        "torchaudio.datasets.speechcommands.download_url_to_file", lambda url, archive, **_: asked.append(archive)
    )
    monkeypatch.setattr(
        "torchaudio.datasets.speechcommands._extract_tar",
        lambda archive, path: Path(path).parent.symlink_to(speech_folder / "SpeechCommands"),
    )
    for data in (Cifar10(cifar_folder, download=True), SpeechCommands(tmp_path / "new" / "data", download=True)):
        data.prepare_data()
        data.setup()
    assert asked == [str(cifar_folder), str(tmp_path / "new" / "data" / "speech_commands_v0.02.tar.gz")]


def test_words_come_from_torchaudios_folder(speech_folder):
    data = SpeechCommands(speech_folder)
    data.setup()
    # Of the speakers one is for testing, and of "yes" one for validation; "bed" is none of the words.
    assert torch.bincount(data.true_label).tolist() == [SPEAKERS - 2, *[SPEAKERS - 1] * 9]
    assert data.test_data.y.sort().values.tolist() == list(range(10))
    assert data.train_data.x.shape == (10 * SPEAKERS - 11, 1, 40, 101)
    x, _ = data.on_after_batch_transfer((data.train_data.x, data.train_data.y), 0)
    assert x.mean(dim=(0, 1, 3)).abs().max() < 1e-3
    assert x.std(dim=(0, 1, 3)).allclose(torch.ones(40), atol=1e-3)


def test_digits_come_from_a_folder_or_a_zip_file(tmp_path):
    for digit in range(10):
        for take in (0, 4, 5, 12):
            wav(tmp_path / "deep" / f"{digit}_ann_{take}.wav", 300, rate=8000)
    with zipfile.ZipFile(tmp_path / "digits.zip", "w") as archive:
        for path in (tmp_path / "deep").iterdir():
            archive.write(path, f"recordings/{path.name}")
    found = [SpeechCommands(source, digits=True) for source in (tmp_path, tmp_path / "digits.zip")]
    for data in found:
        data.setup()
        assert sorted(data.true_label.tolist()) == sorted([*range(10)] * 2)
        assert len(data.test_data) == 20
    assert found[0].train_data.x.equal(found[1].train_data.x)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"Expected files \{digit\}_\{speaker\}_\{take\}\.wav .*, but there are none"):
        SpeechCommands(empty, digits=True).setup()
    wav(empty / "3_ann_9.wav", 300)
    with pytest.raises(ValueError, match=r"Expected testing clips in .*: takes 0-4 are for testing"):
        SpeechCommands(empty, digits=True).setup()
    wav(empty / "hello.wav", 300)
    with pytest.raises(ValueError, match=r"Expected files \{digit\}_\{speaker\}_\{take\}\.wav .*, but got hello\.wav"):
        SpeechCommands(empty, digits=True).setup()


def test_clips_that_are_not_there_and_misspelt_noise_are_refused(speech_folder):
    with pytest.raises(ValueError, match="labels to be clean, symmetric or asymmetric, but got 'human'"):
        SpeechCommands(speech_folder, labels="human")
    with pytest.raises(ValueError, match="Expected train_size from 1 to 289, all clips, but got 290"):
        SpeechCommands(speech_folder, train_size=290).setup()
    with pytest.raises(ValueError, match=r"Expected clips of every word for training, but .* has none of nope, yess"):
        SpeechCommands(speech_folder, words=("yess", "nope", *WORDS[2:])).setup()


def test_a_clip_is_one_second_at_16_khz_of_16_bits(tmp_path):
    wav(tmp_path / "0_ann_7.wav", 440, rate=8000, seconds=0.5)
    wav(tmp_path / "1_ann_7.wav", 440, rate=8000, seconds=1.5)
    clips = speech_commands.spoken_digits(tmp_path, "training")
    (short, label), (long, _) = clips[0], clips[1]
    assert (short.shape, long.shape, label) == ((1, RATE), (1, RATE), 0)
    assert short[0, RATE // 2 + 100 :].abs().max() == 0
    # 440 Hz stay 440 Hz: one per second in steps of the spectrum.
    assert long[0].abs().gt(0).float().mean() > 0.9
    assert torch.fft.rfft(long[0]).abs().argmax() == 440
    wav(tmp_path / "2_ann_7.wav", 440, width=1)
    with pytest.raises(ValueError, match="Expected a 16-bit wav file of one channel, but clip 2 has"):
        speech_commands.spoken_digits(tmp_path, "training")[2]


def test_sounds_are_corrupted_as_mfccs_or_as_waveforms(speech_folder):
    clean = SpeechCommands(speech_folder)
    clean.setup()
    for options in ({"mfcc_sigma": 15.0}, {"snr_db": 0.0}):
        data = SpeechCommands(speech_folder, share=0.5, seed=0, **options)
        data.setup()
        differs = (data.train_data.x - clean.train_data.x).abs().amax(dim=(1, 2, 3)) > 0.01
        assert differs.equal(data.is_corrupted)
        assert data.is_corrupted.sum() == round((10 * SPEAKERS - 11) / 2)
    with pytest.raises(ValueError, match=r"Expected one kind of noise, but got mfcc_sigma=15.0 and snr_db=0.0"):
        SpeechCommands(speech_folder, mfcc_sigma=15.0, snr_db=0.0)


def test_the_networks_have_the_papers_heads():
    for network, hidden, x in (
        (PaperResNet18(), 256, torch.zeros(2, 3, 32, 32)),
        (PaperSpeechCnn(channels=2), 128, torch.zeros(2, 1, 40, 101)),
    ):
        assert network.head.in_features == hidden
        assert network(x).shape == (2, 10)
    stem = PaperResNet18(stem="3x3").net
    assert stem.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert stem.layer1(stem.maxpool(stem.relu(stem.bn1(stem.conv1(torch.zeros(1, 3, 32, 32)))))).shape[-1] == 32
    assert PaperResNet18().configure_optimizers().defaults["lr"] == 0.1
    (_,), (schedule,) = PaperSpeechCnn(channels=2, decay_epochs=5).configure_optimizers()
    assert schedule.T_max == 5


@pytest.mark.parametrize(
    ("task", "variant"),
    [
        ("cifar10", None),
        ("speech_commands", "rlap-l-ft"),
        ("speech_commands", "auto-f-ft"),
        ("speech_commands", "auto-l-ft"),
    ],
)
def test_the_papers_protocol_runs_from_yaml(task, variant, folder_of, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    configs = [EXAMPLES / task / "paper.yaml"]
    if variant is not None:
        configs.append(EXAMPLES / "paper" / f"{variant}.yaml")
    arguments = []
    for i, config in enumerate(configs):
        text = config.read_text(encoding="utf-8")
        assert yaml.safe_load(text)["trainer"]["callbacks"][0]["init_args"]["at_epoch"] == 60
        short = tmp_path / f"{i}.yaml"
        short.write_text(text.replace("at_epoch: 60", "at_epoch: 1"), encoding="utf-8")
        arguments += ["--config", str(short)]
    of_data = {"data": str(folder_of[task]), "download": "false", "batch_size": "64", "train_size": "null"}
    for name, value in of_data.items():
        arguments += [f"--data.init_args.{name}", value]
    if task == "speech_commands":
        arguments += ["--model.init_args.channels", "2"]
    quiet = {"max_epochs": "2", "accelerator": "cpu", "enable_progress_bar": "false", "precision": "32-true"}
    for name, value in quiet.items():
        arguments += [f"--trainer.{name}", value]
    # Its own level too, which a benchmark of an earlier test may have raised.
    with caplog.at_level("INFO"), caplog.at_level("INFO", logger="lightning.pytorch"):
        main(["fit", *arguments])
    assert "Partition after 1 epoch" in caplog.text


MAKE = {"cifar10": Cifar10, "speech_commands": SpeechCommands}


@pytest.fixture(params=MAKE)
def partitioned(request, folder_of, tmp_path, monkeypatch):
    """A task, its data with wrong labels, and a file with the partition that knows which."""
    monkeypatch.chdir(tmp_path)
    whole = MAKE[request.param](folder_of[request.param], labels="symmetric")
    whole.setup()
    given, nothing = whole.train_data.y, torch.zeros(len(whole.train_data))
    Partition(
        clean_probability=(~whole.is_wrong).float(),
        is_clean=~whole.is_wrong,
        suggested_label=given,
        suggested_probability=nothing,
        noise_rate=0.4,
        label=given,
        label_evidence=nothing,
        input_evidence=nothing + 1,
        reason=whole.is_wrong.to(torch.uint8),
        noise_matrix=torch.eye(10),
        recipe="label",
        layer="input of 'head'",
        epoch=1,
    ).save("partition.npz")
    return request.param, whole


def test_what_a_partition_calls_clean_is_what_there_is_to_train_on(partitioned):
    task, whole = partitioned
    data = MAKE[task](whole.data, labels="symmetric", partition="partition.npz")
    data.setup()
    clean, total = ~whole.is_wrong, len(whole.is_wrong)
    assert 0 < len(data.train_data) < total
    assert data.train_data.x.equal(whole.train_data.x[clean])
    assert data.train_data.y.equal(data.true_label)
    assert len(data.is_wrong) == len(data.is_corrupted) == len(data.train_data)
    with pytest.raises(ValueError, match=f"partition.npz to be of these {total - 5} training .* it is of {total}:"):
        MAKE[task](whole.data, train_size=total - 5, partition="partition.npz").setup()


def test_new_weights_are_trained_from_yaml(partitioned, monkeypatch):
    task, whole = partitioned
    said = ["--config", str(EXAMPLES / task / "paper.yaml"), "--config", str(EXAMPLES / "paper" / "retrain.yaml")]
    options = {"data": whole.data, "download": "false", "train_size": "null", "labels": "symmetric"}
    for name, value in (options | {"partition": "partition.npz"}).items():
        said += [f"--data.init_args.{name}", str(value)]
    fits = []
    monkeypatch.setattr(
        L.Trainer, "fit", lambda trainer, model, datamodule=None, **_: fits.append((trainer, datamodule))
    )
    main(["fit", *said, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"])
    ((trainer, data),) = fits
    assert trainer.max_epochs == 60
    assert not any("lightning_unlearn" in type(callback).__module__ for callback in trainer.callbacks)
    assert data.partition == "partition.npz"
