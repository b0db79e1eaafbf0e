import re
from pathlib import Path

from tests.ranks import run_python

ROOT = Path(__file__).parents[1]


def test_the_script_runs_from_any_folder_and_shows_what_it_found(tmp_path):
    done = run_python(tmp_path, ROOT / "examples" / "digits.py", "--fast")
    assert done.returncode == 0, done.stdout + done.stderr
    shown = done.stdout
    before, after = map(float, re.search(r"accuracy (0\.\d+) after 3 epochs, (0\.\d+) with the repair", shown).groups())
    assert before > 0.5
    assert after > 0.5
    suspects = shown.strip().splitlines()[-5:]
    assert all(re.fullmatch(r"\d+ \d \d 0\.\d{4}", line) for line in suspects)
