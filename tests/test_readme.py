import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_first_example_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len(code.strip().splitlines()) <= 12
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "suspects.csv").read_text().startswith("index,given_label,suggested_label")
    partition = names["partition"].partition
    wrong = names["data"].given_label != names["data"].true_label
    assert ((~partition.is_clean) == wrong).float().mean() > 0.9


def test_the_first_thirty_lines_say_what_it_is_what_it_brings_and_how_to_use_it():
    top = "\n".join(README.splitlines()[:45])
    for needed in ("pip install", "AttributionPartitionCallback", "| F-FT", "make demo"):
        assert needed in top
