"""Log lines beside a progress bar."""

import sys

from tqdm import tqdm

from lightning_unlearn.trainer.progress import rank_zero_info


def test_a_line_does_not_run_on_from_the_end_of_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_info", print)
    with tqdm(total=2, file=sys.stdout, desc="Epoch 0", mininterval=0) as bar:
        bar.update(1)
        rank_zero_info("Partition after 5 epochs")
        shown = capsys.readouterr().out
    before, _, after = shown.partition("Partition after 5 epochs\n")
    drawn, _, cleared = before.rpartition("\r")[0].rpartition("\r")
    assert "Epoch 0" in drawn
    assert not (cleared + before.rpartition("\r")[2]).strip()
    assert "Epoch 0" in after
