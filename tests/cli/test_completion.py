"""Completion scripts: those of a shell that reads them complete our commands and LightningCLI's options."""

import shutil
import subprocess

import pytest

from lightning_unlearn.cli import main

pytest.importorskip("shtab")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The bash script, in a file."""
    patch = pytest.MonkeyPatch()
    printed = []
    patch.setattr("builtins.print", lambda *values, **_: printed.extend(values))
    with pytest.raises(SystemExit) as exit_info:
        main(["--print-completion", "bash"])
    patch.undo()
    assert exit_info.value.code in (0, None)
    file = tmp_path_factory.mktemp("completion") / "lightning-unlearn.bash"
    file.write_text("\n".join(printed))
    return file


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("lightning-unlearn p", ["partition"]),
        ("lightning-unlearn re", ["report"]),
        ("lightning-unlearn partition --at", ["--at_epoch"]),
        ("lightning-unlearn fit --trainer.max_e", ["--trainer.max_epochs"]),
        ("lightning-unlearn shrink --lay", ["--layers", "--layers+"]),
        ("lightning-unlearn report --cont", ["--control"]),
        ("lightning-unlearn init --config", []),
    ],
)
def test_bash_completes(line, completed, script):
    words = line.split()
    code = f"""
set -e
bash -n {script}
source {script}
COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
_shtab_lightning_unlearn lightning-unlearn {words[-1]} {words[-2]} || true
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == completed


def test_zsh_has_a_script_too(capsys):
    with pytest.raises(SystemExit):
        main(["--print-completion", "zsh"])
    out = capsys.readouterr().out
    assert out.startswith("#compdef lightning-unlearn")
    assert "--trainer.max_epochs" in out
