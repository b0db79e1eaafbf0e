"""Runs the code in README.md and docs/, page by page and in the order in which it stands, with Sybil.

Python is executed, one namespace a page, in an empty folder; YAML is read by LightningCLI; of shell commands it is
checked that they would be accepted. What cannot be run has `<!-- skip: next "why" -->` before it.
"""

import os
import re
import shlex
import tempfile
import warnings
from pathlib import Path

import yaml
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from sybil.sybil import Sybil, SybilCollection

# Sphinx's settings need Sphinx, and the figures' script is no module.
collect_ignore_glob = ["docs/*.py", "docs/_build/*"]

ROOT = Path(__file__).parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DEMO = {
    "model": {"class_path": "lightning_unlearn.demo.DigitsClassifier"},
    "data": {"class_path": "lightning_unlearn.demo.DigitsDataModule"},
}


def read_yaml(example):
    """Makes the Trainer, the callbacks, the model and the data that are written there."""
    from lightning.pytorch.cli import LightningCLI

    config = {**DEMO, **yaml.safe_load(example.parsed)}
    config["trainer"] = {"logger": False, "accelerator": "cpu", "devices": 1, **config.get("trainer", {})}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # pytest has arguments of its own
        LightningCLI(args=config, run=False, save_config_callback=None, seed_everything_default=False)


def check_commands(example):
    """Each line is a command that exists, with arguments that it takes."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            CHECKS[words[0]](words)


def check_ours(words):
    from lightning_unlearn.cli._main import make_parser

    if words[1] in ("fit", "partition", "shrink"):  # LightningCLI's own; its YAML is read where it is shown
        from lightning_unlearn.cli._completion import options_with_config

        known = {name for action in options_with_config(words[1]) for name in action.option_strings}
        assert words[2] == "--config", words
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, words
    else:
        make_parser().parse_args(words[1:])


def check_make(words):
    for word in words[1:]:
        name, is_variable, _ = word.partition("=")
        assert re.search(rf"^{name} \?=" if is_variable else rf"^{name}:", MAKEFILE, re.MULTILINE), word


def check_pip(words):
    assert words[1] == "install", words
    # The checkout, or a wheel of it, or its repository.
    found = re.fullmatch(r"(\.|lightning-unlearn)(?:\[([\w,]+)\])?(?: @ git\+https://.*/lightning-unlearn)?", words[-1])
    assert found or words[-1] == "dist/*.whl", words
    extras = found[2].split(",") if found and found[2] else []
    assert all(re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE) for extra in extras), words


def check_uv(words):
    assert words[:3] == ["uv", "pip", "install"], words
    check_pip(words[1:])


def check_python(words):
    if words[1] == "train.py":  # a user's own
        return
    path = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
    assert (ROOT / path).is_file(), words


CHECKS = {
    "lightning-unlearn": check_ours,
    "make": check_make,
    "pip": check_pip,
    "uv": check_uv,
    "python": check_python,
}


def begin(namespace):
    import torch  # not when pytest starts, for which pytest-xdist waits

    namespace["_before"] = Path.cwd(), torch.get_num_threads(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.chdir(namespace["_before"][2].name)
    torch.set_num_threads(1)


def end(namespace):
    import torch

    folder, threads, temporary = namespace.pop("_before")
    os.chdir(folder)
    torch.set_num_threads(threads)
    temporary.cleanup()


SHARED = [
    CodeBlockParser(language="yaml", evaluator=read_yaml),
    CodeBlockParser(language="sh", evaluator=check_commands),
    SkipParser(),
]
PAGES = Sybil([PythonCodeBlockParser(), *SHARED], pattern="*.md", path="docs", setup=begin, teardown=end)
README = Sybil(SHARED, filenames=["README.md"])  # tests/test_readme.py runs its example
pytest_collect_file = SybilCollection([PAGES, README]).pytest()
