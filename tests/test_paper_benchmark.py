"""The paper's protocol, run arm by arm on sounds that are made up."""

import json

import pytest
import torch

pytest.importorskip("benchmarks", reason="not a checkout")
pytest.importorskip("torchvision")
pytest.importorskip("torchaudio")
from benchmarks import paper
from benchmarks.paper_arms import ARMS, PaperUnit, Setting
from examples.speech_commands.speech_commands import made_up


@pytest.fixture(scope="module")
def unit(tmp_path_factory):
    sounds = made_up(tmp_path_factory.mktemp("sounds") / "made_up", takes=12)
    setting = Setting(
        "speech", "symmetric", None, base_epochs=2, repair_epochs=1, network={"channels": 2}, precision="32-true"
    )
    folder = tmp_path_factory.mktemp("unit")
    return PaperUnit(setting, 0, folder=folder, data=sounds, accelerator="cpu")


def test_fine_tuning_goes_on_from_the_initial_model(unit):
    found = unit.result("oracle, F-FT")
    initial = unit.result("initial")
    # 70 clips in batches of 64; of 42 with right labels one batch.
    assert (initial["steps"], initial["epochs"]) == (4, 2)
    assert (found["steps"], found["epochs"], found["acted"]) == (1, 1, True)
    assert found["partition"]["auroc"] == 1
    assert found["partition"]["flagged"] == pytest.approx(28 / 70)
    assert (unit.folder / "initial.ckpt").exists()
    assert found["seconds"] > 0


def test_the_controls_have_the_steps_and_the_data_that_they_say(unit, monkeypatch):
    fitted = {}
    fit = PaperUnit._fit

    def spy(self, model, data, callbacks, epochs, **options):
        fitted[self.arm] = (model, len(data.train_data), options)
        return fit(self, model, data, callbacks, epochs, **options)

    monkeypatch.setattr(PaperUnit, "_fit", spy)
    for unit.arm in ("auto, F-FT", "auto, retrain", "auto, retrain, rate decays", "auto, continue on all"):
        unit.result(unit.arm)
    repaired = unit.result("auto, F-FT")
    flagged = repaired["partition"]["flagged"]
    assert unit.result("auto, continue on all")["steps"] == repaired["steps"]
    assert fitted["auto, continue on all"][1] == 70
    for arm in ("auto, retrain", "auto, retrain, rate decays"):
        assert fitted[arm][1] == round(70 * (1 - flagged))
        assert unit.result(arm)["epochs"] == 2
    assert fitted["auto, retrain"][0].hparams["decay_epochs"] is None
    assert fitted["auto, retrain, rate decays"][0].hparams["decay_epochs"] == 2


def test_criteria_prune_the_same_number_and_l_ft_trains_the_last_layers(unit):
    found = unit.result("prune random, L-FT")
    if found["acted"]:
        assert found["pruned"] == pytest.approx(128 * 40 / 256, abs=6)  # of live neurons
    assert ARMS["prune random, L-FT"].mode == "layers"
    assert unit.result("prune random, L-FT") == found
    assert torch.load(unit.folder / "initial.ckpt", weights_only=True)["epoch"] == 1


def test_nothing_is_pruned_by_a_partition_that_is_not_acted_upon(unit, tmp_path):
    plain = {"arm": "auto, L-FT", "accuracy": 0.5, "steps": 4, "pruned": 0, "acted": False, "seed": 0}
    (tmp_path / "auto, L-FT.json").write_text(json.dumps(plain), encoding="utf-8")
    again = PaperUnit(unit.setting, 0, folder=tmp_path, data=tmp_path / "no sounds", accelerator="cpu")
    found = again.result("prune random, L-FT")  # without a fit, for which there are no data
    assert {name: found[name] for name in plain} == plain | {"arm": "prune random, L-FT"}


def test_a_noise_that_a_task_does_not_have_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["paper", "--task", "speech", "cifar10", "--noise", "snr", "paper"])
    with pytest.raises(SystemExit, match="cifar10 has no noise snr; it has paper, paper8, gaussian, symmetric, human"):
        paper.main()
