import re
from pathlib import Path

from lightning_unlearn.demo import DigitsDataModule

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_example_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    assert "max_epochs=30" in code
    names = {}
    # In fewer epochs than there, as the demo that CI runs takes as many.
    exec(compile(code.replace("max_epochs=30", "max_epochs=10"), "README.md", "exec"), names)
    assert (tmp_path / "suspects.csv").read_text(encoding="utf-8-sig").startswith("index,given_label,suggested_label")
    partition = names["partition"].partition
    data = DigitsDataModule(noise=0.4)
    data.setup()
    wrong = data.given_label != data.true_label
    assert ((~partition.is_clean) == wrong).float().mean() > 0.9


def test_it_says_what_it_is_how_to_install_and_use_it_and_shows_it_before_any_table():
    places = [README.index(part) for part in ("# lightning-unlearn", "pip install", "```python", "report.png", "\n| ")]
    assert places == sorted(places)
    assert (ROOT / re.search(r"!\[.+\]\((.+)\)", README)[1]).stat().st_size < 100_000


def test_a_yaml_in_it_names_no_layer_and_sets_nothing():
    for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL):
        assert "init_args" not in block


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)", README)
    assert len(links) > 15
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]
