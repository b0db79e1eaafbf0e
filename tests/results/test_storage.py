"""Files that were not written by us, and files that must not be lost. How many bad files: see ``BAD``."""

import ast
import csv
import io
import json
import os
import pickle
import stat
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_unlearn
from lightning_unlearn import NeuronMask, Partition
from lightning_unlearn.results.partition import STATE_VERSION
from lightning_unlearn.results.storage import load_record, save_record
from lightning_unlearn.utilities.files import replacing, source_file, target_file, target_folder, write_csv
from tests.results.test_partition import make_partition


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return exec, ("open('ran', 'w').close()",)


def member(array, allow_pickle=False):
    content = io.BytesIO()
    np.lib.format.write_array(content, array, allow_pickle=allow_pickle)
    return content.getvalue()


def primitives(**changes):
    """What is not a tensor in a partition, some of it other; None leaves one out."""
    found = {name: value for name, value in vars(make_partition()).items() if not isinstance(value, Tensor)} | changes
    return {name: value for name, value in found.items() if value is not None}


def about(**changes):
    description = {"format": "lightning_unlearn.Partition", "version": STATE_VERSION, "values": primitives()}
    return member(np.array(json.dumps(description | changes)))


def members(**changes):
    """The members of a partition's archive, some of them others; None leaves one out."""
    arrays = {name: member(x.numpy()) for name, x in vars(make_partition()).items() if isinstance(x, Tensor)}
    found = {"about": about(), **arrays, **changes}
    return {f"{name}.npy": content for name, content in found.items() if content is not None}


def archive(contents, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, content in contents.items():
            made.writestr(name, content)
    return file.getvalue()


def saved(save, *values):
    file = io.BytesIO()
    save(*values, file)
    return file.getvalue()


def values(**changes):
    return about(values=primitives(**changes))


def torch_file(value, **kwargs):
    file = io.BytesIO()
    torch.save(value, file, **kwargs)
    return file.getvalue()


def good_file():
    return archive(members())


def huge_header():
    """An array that says to be larger than any memory."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**50,)})
    return header.getvalue()


def twice():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in members().items():
            made.writestr(name, content)
        with pytest.warns(UserWarning, match="Duplicate name"):
            made.writestr("label.npy", members()["label.npy"])
    return file.getvalue()


def mask_file():
    mask = NeuronMask("fc", torch.tensor([True, False]), torch.zeros(2))
    mask.save("mask.npz")
    return Path("mask.npz").read_bytes()


BAD = {
    "an empty file": (lambda: b"", "cannot be read"),
    "text": (lambda: b"index,given_label\n0,1\n", "cannot be read"),
    "a pickle": (lambda: pickle.dumps(Evil()), "contains a pickle"),
    "a pickle of protocol 0": (lambda: pickle.dumps(Evil(), protocol=0), "cannot be read"),
    "a file of an earlier version": (
        lambda: torch_file(make_partition().state_dict()),
        "contains a pickle .written by an earlier version.., which is not loaded for safety; save it again",
    ),
    "torch's older format": (
        lambda: torch_file(make_partition().state_dict(), _use_new_zipfile_serialization=False),
        "contains a pickle",
    ),
    "a malicious torch file": (lambda: torch_file(Evil()), "contains a pickle"),
    "an array alone": (lambda: member(np.zeros(3)), "cannot be read"),
    "a member too many": (lambda: archive(members() | {"run.py": b"1"}), "there is 'run.py' in it"),
    "a path out of the folder": (lambda: archive(members() | {"../x.npy": b"1"}), "there is '../x' in it"),
    "two members of a name": (twice, "two of a name"),
    "a pickle among the members": (lambda: archive(members() | {"x.pkl": pickle.dumps(Evil())}), "contains a pickle"),
    "a member that is a pickle": (lambda: archive(members(label=pickle.dumps(Evil()))), "cannot be read"),
    "an object array": (
        lambda: archive(members(label=member(np.array([Evil()] * 5, dtype=object), allow_pickle=True))),
        "Object arrays cannot be loaded",
    ),
    "objects as description": (
        lambda: archive(members(about=member(np.array(Evil(), dtype=object), allow_pickle=True))),
        "Object arrays cannot be loaded",
    ),
    "a structured array": (lambda: archive(members(label=member(np.zeros(5, dtype="i8,i8")))), "cannot be read"),
    "an array of text": (lambda: archive(members(label=member(np.array(["a"] * 5)))), "cannot be read"),
    "an array of dates": (lambda: archive(members(label=member(np.zeros(5, dtype="M8[s]")))), "cannot be read"),
    "the other byte order": (lambda: archive(members(label=member(np.zeros(5, dtype=">i8")))), "cannot be read"),
    "an array larger than the memory": (lambda: archive(members(label=huge_header())), "cannot be read"),
    "compressed": (lambda: archive(members(), zipfile.ZIP_DEFLATED), "it is compressed"),
    "no description": (lambda: archive(members(about=None)), "has no description"),
    "a description that is no JSON": (lambda: archive(members(about=member(np.array("{")))), "cannot be read"),
    "a description that is a number": (lambda: archive(members(about=member(np.array(3)))), "description is another"),
    "a deep description": (lambda: archive(members(about=member(np.array("[" * 10**5)))), "cannot be read"),
    "no values": (lambda: archive(members(about=about(values=[1]))), "description is another"),
    "somebody else's npz": (lambda: saved(lambda file: np.savez(file, x=np.zeros(3))), "there is 'x' in it"),
    "a mask": (mask_file, "there is 'keep' in it"),
    "another format": (lambda: archive(members(about=about(format="x"))), "it holds 'x'"),
    "an older version": (
        lambda: archive(members(about=about(version=2))),
        f"has format version 2 where .* has {STATE_VERSION}",
    ),
    "a newer version": (lambda: archive(members(about=about(version=99))), "has format version 99"),
    "a field missing": (lambda: archive(members(about=values(recipe=None))), "its recipe is missing"),
    "an array missing": (lambda: archive(members(label=None)), "its label is missing"),
    "a field too many": (lambda: archive(members(about=values(x=1))), "it has a field 'x' too many"),
    "a number for a text": (lambda: archive(members(about=values(layer=3))), "its layer is a int"),
    "a text for a number": (lambda: archive(members(about=values(noise_rate="1"))), "its noise_rate is a str"),
    "a truth for a number": (lambda: archive(members(about=values(epoch=True))), "its epoch is a bool"),
    "a list for an array": (lambda: archive(members(label=None, about=values(label=[1]))), "its label is a list"),
    "an array for a text": (lambda: archive(members(layer=member(np.zeros(3)))), "its layer is a Tensor"),
    "another dtype": (lambda: archive(members(label=member(np.zeros(5, dtype="i4")))), "label must be torch.int64"),
    "another length": (lambda: archive(members(label=member(np.zeros(4, dtype="i8")))), r"of shape \(4,\)"),
    "a matrix of integers": (
        lambda: archive(members(noise_matrix=member(np.zeros((8, 8), dtype="i8")))),
        "noise_matrix must be torch.float32 with two dimensions, but is torch.int64",
    ),
    "a row for a matrix": (lambda: archive(members(noise_matrix=member(np.zeros(8, dtype="f4")))), "two dimensions"),
    "no probability": (lambda: archive(members(about=values(noise_rate=float("nan")))), "noise_rate is nan"),
}


def mask_of(**arrays):
    description = {"format": "lightning_unlearn.NeuronMask", "version": 1, "values": {"layer": "fc"}}
    found = {"about": np.array(json.dumps(description)), "keep": np.ones(2, bool), "sensitivity": np.zeros(2, "f4")}
    return archive({f"{name}.npy": member(array) for name, array in (found | arrays).items()})


PACKAGE = Path(lightning_unlearn.__path__[0])
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def runs_code(source):
    """Lines that would unpickle or run what a file or a text holds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(names):
                yield node.lineno
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (
                called in ("eval", "exec")
                or (called.startswith("yaml.") and called not in ("yaml.safe_load", "yaml.safe_dump"))
                or (called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False")
                or (called == "torch.load" and given.get("weights_only") != "True")
                or (called.endswith("read_array") and given.get("allow_pickle") != "False")
            ):
                yield node.lineno


def writes(source):
    """Lines that write a file past ``replacing``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            # Into memory.
            name = "" if called == "wave.open" else called.split(".")[-1]
            mode = [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if name in ("write_text", "write_bytes") or (name == "open" and any(set("wax") & set(m) for m in mode)):
                yield node.lineno


# Unpickles what another rank of the same fit has sent, as torch.distributed and Lightning do for objects.
BETWEEN_RANKS = "utilities/exchange.py"


def test_nothing_unpickles_and_every_file_is_written_one_way():
    assert len(FILES) > 200
    sources = {file: (PACKAGE / file).read_text(encoding="utf-8") for file in FILES}
    unpickling = {file: lines for file in FILES if (lines := list(runs_code(sources[file])))}
    assert unpickling.keys() <= {BETWEEN_RANKS}, unpickling
    writing = {file: lines for file in FILES if (lines := list(writes(sources[file])))}
    assert writing.keys() <= {"results/storage.py", "utilities/files.py"}, writing


def test_between_ranks_only_what_a_collective_received_is_unpickled():
    tree = ast.parse((PACKAGE / BETWEEN_RANKS).read_text(encoding="utf-8"))
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
    assert names == {"__future__", "pickle", "collections.abc", "typing", "torch"}
    assert not [call for call in calls if call.startswith(("open(", "torch.load(", "pickle.load("))]
    assert [call for call in calls if call.startswith("pickle.loads(")] == ["pickle.loads(_bytes(one))"]
    assert "torch.split(received.cpu(), sizes)" in calls


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import load",
        "yaml.load(file, yaml.Loader)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.lib.format.read_array(file)",
        "eval(text)",
    ],
)
def test_what_would_run_code_is_found(line):
    assert list(runs_code(line)) == [1]


@pytest.mark.parametrize("line", ["path.write_text('x')", "open(path, 'w')", "path.open('ab')", "path.open('xb')"])
def test_what_writes_is_found(line):
    assert list(writes(line)) == [1]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_and_nothing_runs(name):
    make, message = BAD[name]
    Path("bad.npz").write_bytes(make())
    with pytest.raises(
        ValueError, match=f"(?s)Expected bad.npz to be a file that Partition.save wrote, but .*{message}"
    ):
        Partition.load("bad.npz")
    assert not Path("ran").exists()


def test_the_pickles_of_these_tests_would_run():
    pickle.loads(pickle.dumps(Evil()))
    assert Path("ran").exists()


def test_the_archive_that_bad_ones_are_made_of_is_good():
    Path("good.npz").write_bytes(good_file())
    assert Partition.load("good.npz").recipe == "label"


def test_a_file_cut_off_anywhere_is_refused():
    content = good_file()
    for end in range(0, len(content) - 1, 97):
        Path("cut.npz").write_bytes(content[:end])
        with pytest.raises(ValueError, match="cannot be read"):
            Partition.load("cut.npz")


def test_a_file_with_a_wrong_byte_is_refused_or_the_same():
    make_partition().save("good.npz")
    content, random = Path("good.npz").read_bytes(), np.random.default_rng(0)
    refused = 0
    for place in random.integers(len(content), size=300):
        broken = bytearray(content)
        broken[place] ^= 1 << int(random.integers(8))
        Path("broken.npz").write_bytes(broken)
        try:
            loaded = Partition.load("broken.npz")
        except ValueError:
            refused += 1
        else:
            assert_same(loaded, make_partition())
    assert refused > 150


def assert_same(one, other):
    for name, value in vars(other).items():
        found = getattr(one, name)
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, name
        assert type(found) is type(value), name


@dataclass(frozen=True, eq=False)
class Sample:
    """All kinds of fields."""

    matrix: Tensor
    empty: Tensor
    flag: bool
    count: int
    share: float
    text: str
    names: tuple[str, ...]
    pairs: tuple[tuple[str, int], ...]
    nothing: Tensor | None
    something: Tensor | None
    limit: float | None
    fingerprint: str = "none"


def sample(**changes):
    fields = {
        "matrix": torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
        "empty": torch.zeros(0, 4, dtype=torch.uint8),
        "flag": True,
        "count": -7,
        "share": 2.5e-300,
        "text": "naïve\n\x00\U0001f600 '\"",
        "names": ("a", "b"),
        "pairs": (("a", 1), ("b", 2)),
        "nothing": None,
        "something": torch.tensor(True),
        "limit": None,
    }
    return Sample(**(fields | changes))


def test_every_kind_of_field_comes_back():
    one = sample(fingerprint="abc")
    save_record(one, 1, "sample.npz")
    assert_same(load_record(Sample, 1, "sample.npz"), one)


def test_a_field_of_a_later_version_takes_its_default():
    @dataclass(frozen=True, eq=False)
    class Sample2(Sample):
        later: str = "default"

    Sample2.__name__ = "Sample"
    save_record(sample(), 1, "sample.npz")
    assert load_record(Sample2, 1, "sample.npz").later == "default"


def test_numpy_reads_the_arrays_without_a_pickle():
    make_partition().save("partition")  # the name is taken as it is
    with np.load("partition", allow_pickle=False) as content:
        assert content["label"].tolist() == [3, 7, 4, 0, 6]
        assert json.loads(str(content["about"]))["values"]["recipe"] == "label"


@pytest.mark.parametrize("standard_error", [None, torch.rand(3)])
def test_a_mask_comes_back(standard_error):
    mask = NeuronMask("net.fc", torch.tensor([True, False, True]), torch.tensor([0.5, -2.0, 0.0]), standard_error)
    mask.save("mask.npz")
    assert_same(NeuronMask.load("mask.npz"), mask)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda: torch_file({"keep": 1}),
            "NeuronMask.save wrote, but it contains a pickle",
        ),
        (good_file, "there is 'clean_probability' in it"),
        (lambda: mask_of(sensitivity=np.zeros(2, dtype="i8")), "sensitivity must be of a floating type"),
        (lambda: mask_of(keep=np.zeros(2, dtype="i8")), "keep must be bool"),
    ],
    ids=["torch file", "partition", "integers", "no mask"],
)
def test_a_bad_mask_file_is_refused(content, message):
    Path("mask.npz").write_bytes(content())
    with pytest.raises(ValueError, match=message):
        NeuronMask.load("mask.npz")


def test_where_nothing_is_there_it_says_so():
    with pytest.raises(FileNotFoundError):
        Partition.load("nowhere.npz")


def test_folders_are_made_and_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    make_partition().save("~/a/b/partition.npz")
    assert Partition.load(Path("~/a/b/partition.npz")).epoch == 5
    make_partition().to_csv(Path("~/c/suspects.csv"))
    assert (tmp_path / "c" / "suspects.csv").exists()
    assert target_file("~/d/x") == tmp_path / "d" / "x"
    assert source_file("~/d/x") == tmp_path / "d" / "x"


def test_a_file_is_no_folder_to_write_to():
    Path("file").touch()
    for act in (target_folder, lambda path: target_file(f"{path}/x"), lambda path: target_folder(f"{path}/x/y")):
        with pytest.raises(ValueError, match=r"Expected a folder to write to, but .* is a file; give another"):
            act("file")


@pytest.mark.parametrize("act", [Partition.save, Partition.to_csv])
def test_a_folder_is_no_file_to_write(act, tmp_path):
    with pytest.raises(ValueError, match=r"Expected a file to write, but .* is a folder; give a name in it"):
        act(make_partition(), tmp_path)


def test_a_folder_is_no_file_to_read(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a file to read, but .* is a folder; give the file in it"):
        Partition.load(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_what_would_be_read_for_ever_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match=rf"Expected a file to read, but {path} is a device, pipe or socket"):
            source_file(path)


def test_what_was_there_stays_until_the_new_file_is_complete(tmp_path):
    def fail():
        with replacing("result") as file:
            file.write(b"half")
            assert Path("result").read_bytes() == b"old"
            raise KeyboardInterrupt

    Path("result").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert Path("result").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.skipif(os.name == "nt", reason="links and modes of POSIX")
def test_a_link_stays_a_link_and_the_mode_is_the_usual_one(tmp_path):
    Path("real").write_bytes(b"old")
    Path("link").symlink_to("real")
    with replacing("link") as file:
        file.write(b"new")
    assert Path("link").is_symlink()
    assert Path("real").read_bytes() == b"new"
    Path("other").touch()
    assert stat.S_IMODE(Path("real").stat().st_mode) == stat.S_IMODE(Path("other").stat().st_mode)


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_private_file_stays_private_while_it_is_replaced(mode):
    Path("mine").write_bytes(b"old")
    Path("mine").chmod(mode)
    with replacing("mine") as file:
        file.write(b"new")
        (part,) = Path().glob(".mine*.part")
        assert stat.S_IMODE(part.stat().st_mode) == 0o600
    assert Path("mine").read_bytes() == b"new"
    assert stat.S_IMODE(Path("mine").stat().st_mode) == mode


@pytest.mark.skipif(os.name == "nt", reason="a pipe of POSIX")
def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo("pipe")
    reader = subprocess.Popen(
        [sys.executable, "-c", "print(open('pipe', encoding='utf-8-sig').read())"], stdout=subprocess.PIPE, text=True
    )
    write_csv("pipe", {"a": [1]})
    assert reader.communicate(timeout=60)[0].split() == ["a", "1"]
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode)


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+1+1",
        "-1+1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        " =1",
        "=cmd|' /C calc'!A0",
        "+5",
        "-cat",
        "\uff1d1+1",
        "-",
    ],
)
def test_a_text_that_a_spreadsheet_would_run_is_quoted(text):
    write_csv("table.csv", {text: [text, 1]})
    with Path("table.csv").open(newline="", encoding="utf-8-sig") as file:
        assert list(csv.reader(file)) == [[f"'{text}"], [f"'{text}"], ["1"]]


@pytest.mark.parametrize("value", [-1, -0.5, 0, 3, "-0.500000", "1e-05", "-1.5e+10", "nan", "-inf", "inf", True, None])
def test_numbers_stay_numbers(value):
    write_csv("table.csv", {"x": [value, "cat", "a-b", "it's"]})
    with Path("table.csv").open(newline="", encoding="utf-8-sig") as file:
        assert [row[0] if row else "" for row in csv.reader(file)] == [
            "x",
            "" if value is None else str(value),
            "cat",
            "a-b",
            "it's",
        ]


def test_a_text_does_not_fall_into_two_cells_where_another_separator_is_the_custom():
    write_csv("table.csv", {"x": ["cat;=1+1"], "y": [2]})
    assert Path("table.csv").read_bytes() == b'\xef\xbb\xbf"x","y"\r\n"cat;=1+1","2"\r\n'


def test_class_names_stand_beside_the_labels():
    names = ["zero", "=one", "two", "three", "four", "five", "-six", "seven"]
    make_partition().to_csv("named.csv", class_names=names)
    with Path("named.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = [row[:5] for row in csv.reader(file)]
    assert rows == [
        ["index", "given_label", "given_class", "suggested_label", "suggested_class"],
        ["2", "4", "four", "2", "two"],
        ["4", "6", "'-six", "5", "five"],
        ["1", "7", "seven", "1", "'=one"],
    ]


@pytest.mark.parametrize(
    ("names", "matrix", "message"),
    [
        (["a"] * 7, 8, "name each of 8 classes, but got 7 names"),
        (["a"] * 9, 8, "name each of 8 classes, but got 9 names"),
        (["a"] * 7, 0, "name each of 8 classes, but got 7 names"),
        ("abcdefgh", 8, "name each of 8 classes, but got the text 'abcdefgh'"),
    ],
)
def test_as_many_names_as_classes(names, matrix, message):
    partition = make_partition(noise_matrix=torch.zeros(matrix, matrix))
    with pytest.raises(ValueError, match=message):
        partition.to_csv("named.csv", class_names=names)
    assert not Path("named.csv").exists()


def test_more_names_than_labels_seen_are_fine_where_the_number_of_classes_is_not_known():
    make_partition(noise_matrix=torch.zeros(0, 0)).to_csv("named.csv", class_names=["a"] * 20)
    assert Path("named.csv").exists()


def header(shape, descr="<i8"):
    """An array of which only the header is there."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def labels(*values):
    return member(np.array(values, dtype=np.int64))


FORGED = {
    "more than there is": (lambda: members(label=header((10**12,)) + bytes(40)), "claims to have shape"),
    "less than there is": (lambda: members(label=header((3,)) + bytes(40)), "claims to have shape"),
    "nothing many times": (lambda: members(label=header((10**12,), "<U0")), "claims to have shape"),
    "no rows of many labels": (lambda: members(label=header((0, 10**12))), "label must be torch.int64 of shape"),
    "many columns of nothing": (lambda: members(noise_matrix=header((0, 2**40), "<f4")), "a row for each column"),
    "a row too many": (lambda: members(noise_matrix=member(np.zeros((3, 2), "f4"))), "a row for each column"),
    "many labels of no sample": (
        lambda: members(label_probability=header((0, 2**40), "<f4")),
        r"label_probability must have shape \(5, L\) or \(0, 0\)",
    ),
    "a class beyond any": (lambda: members(label=labels(0, 1, 2, 3, 2**40)), r"label must lie in \[-1, 16,777,215\]"),
    "a class below any": (lambda: members(suggested_label=labels(0, 1, 2, 3, -(2**40))), "suggested_label must lie in"),
    "no number": (lambda: members(label_evidence=member(np.full(5, np.nan, "f4"))), "label_evidence must be finite"),
    "a threshold of text": (lambda: members(about=values(relabel_threshold="x")), "its relabel_threshold is a str"),
    "a threshold out of range": (lambda: members(about=values(relabel_threshold=2)), "relabel_threshold to lie in"),
    "a number of many digits": (lambda: members(about=values(epoch=10**4000)), "epoch must be a number of epochs"),
    "a deep list": (lambda: members(about=member(np.array('{"values": ' + "[" * 900 + "]" * 900 + "}"))), "."),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_a_file_says_of_itself_takes_no_memory(name):
    make, message = FORGED[name]
    Path("forged.npz").write_bytes(archive(make()))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"^Expected forged.npz to be a file .*{message}") as error:
            Partition.load("forged.npz")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 600
