"""``shrink``: a pruned checkpoint made smaller, from the same YAML."""

import re

import pytest
import torch

from lightning_unlearn.cli import main
from lightning_unlearn.cli._config import find_users_classes

pytest.importorskip("torch_pruning")


@pytest.fixture
def pruned(team):
    """A checkpoint in which 6 of 16 neurons are silent, and one in which none is."""
    find_users_classes()
    from team import TeamModel

    torch.manual_seed(0)
    model = TeamModel(width=16)
    torch.save({"state_dict": model.state_dict()}, "whole.ckpt")
    with torch.no_grad():
        model.encoder[0].weight[:6], model.encoder[0].bias[:6] = 0, 0
    torch.save({"state_dict": model.state_dict()}, "pruned.ckpt")
    return model


def shrink(*arguments):
    main(["shrink", "--config", "run.yaml", "--repeats", "1", *arguments])


def test_what_is_written_is_smaller_says_the_same_and_loads_as_it_is_told(pruned, capsys):
    shrink("--ckpt_path", "pruned.ckpt", "--out", "made/small.pt")
    said = capsys.readouterr().out
    assert re.search(r"^parameters +178 +112 +-37.1%$", said, re.M)
    assert re.search(r"^MACs +2,560 +1,600 ", said, re.M)
    assert re.search(r"^latency / ms ", said, re.M)
    assert float(re.search(r"differ by at most ([\d.e+-]+),", said)[1]) < 1e-6
    names = {}
    exec("\n".join(line.strip() for line in said.partition("To load it:\n")[2].splitlines()), names)
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert names["model"](x).allclose(pruned(x), atol=1e-6)
    assert names["model"].encoder[0].out_features == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--ckpt_path", "whole.ckpt"],
            "Nothing to shrink in whole.ckpt, so nothing is written.*found no neuron to cut",
        ),
        (["--ckpt_path", "pruned.ckpt", "--layers", "[out]"], "Nothing to shrink in pruned.ckpt"),
        (["--ckpt_path", "pruned.ckpt", "--layers", "[encoder.1]"], "Expected layers to be among.*but got 'encoder.1'"),
        (["--ckpt_path", "pruned.ckpt", "--model.width", "8"], "do not fit: size mismatch for encoder.0.weight"),
        (["--ckpt_path", "nosuch.ckpt"], "nosuch.ckpt does not exist"),
        ([], "Expected a checkpoint to shrink; give --ckpt_path"),
    ],
)
def test_where_nothing_can_be_shrunk_a_sentence_says_why_and_nothing_is_written(arguments, message, pruned, tmp_path):
    with pytest.raises(SystemExit, match=f"lightning-unlearn shrink: error: .*{message}"):
        shrink(*arguments, "--out", "small.pt")
    assert not (tmp_path / "small.pt").exists()


def test_the_layers_that_are_named_are_cut_and_a_saved_configuration_will_do(pruned, team, capsys):
    main(["fit", "--config", "run.yaml", "--trainer.max_epochs", "1"])
    capsys.readouterr()
    arguments = ["--config", "config.yaml", "--repeats", "1", "--ckpt_path", "pruned.ckpt", "--layers", "[encoder.0]"]
    main(["shrink", *arguments])
    assert "-37.1%" in capsys.readouterr().out
