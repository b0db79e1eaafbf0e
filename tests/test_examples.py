import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_script_runs_from_any_folder_and_shows_what_it_found(tmp_path):
    shown = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "digits.py"), "--fast"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    ).stdout
    before, after = map(float, re.search(r"accuracy (0\.\d+) after 3 epochs, (0\.\d+) with the repair", shown).groups())
    assert before > 0.5
    assert after > 0.5
    suspects = shown.strip().splitlines()[-5:]
    assert all(re.fullmatch(r"\d+ \d \d 0\.\d{4}", line) for line in suspects)
