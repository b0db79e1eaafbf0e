"""Tables of decisions, as spreadsheets leave them and as they must not be."""

import csv
import io

import numpy as np
import pytest
import torch

from lightning_unlearn.results.labels import DROP, KEEP, RELABEL, UNDECIDED
from lightning_unlearn.results.review import Review, validate_review
from lightning_unlearn.results.review_csv import check_undecided, read_review
from tests.callbacks.published import make_partition

FINGERPRINT = "6:" + "".join(f"{k:02x}abcdef" for k in range(6))
MARK = "n6-000102030405"
TITLES = ["index", "given_label", "suggested_label", "decision", "dataset"]
ROWS = [["4", "1", "3", "relabel", MARK], ["0", "2", "2", "Keep ", MARK], ["5", "0", "1", "DROP", MARK]]
WANTED = {4: (RELABEL, 3), 0: (KEEP, -1), 5: (DROP, -1)}


def table(rows=ROWS, titles=TITLES, delimiter=",", quoting=csv.QUOTE_MINIMAL, end="\r\n"):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows([titles, *rows])
    return text.getvalue()


def written(folder, content):
    path = folder / "suspects.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fitted(path, total=6, classes=4, fingerprint=FINGERPRINT, **kwargs):
    return validate_review(read_review(path), total=total, classes=classes, fingerprint=fingerprint, **kwargs)


def decided(review):
    columns = review.index.tolist(), review.decision.tolist(), review.new_label.tolist()
    return {index: (decision, new) for index, decision, new in zip(*columns, strict=True)}


def reordered():
    order = [4, 3, 1, 0, 2]
    return table([[row[k] for k in order] for row in reversed(ROWS)], [TITLES[k] for k in order])


SPREADSHEETS = {
    "as written": table(),
    "unix line ends": table(end="\n"),
    "old Mac line ends": table(end="\r"),
    "semicolons": table(delimiter=";"),
    "tabs": table(delimiter="\t"),
    "UTF-8 with a mark": table().encode("utf-8-sig"),
    "UTF-16 with tabs": table(delimiter="\t").encode("utf-16"),
    "Excel's own first line": "sep=;\r\n" + table(delimiter=";"),
    "all quoted": table(quoting=csv.QUOTE_ALL, delimiter=";"),
    "other order of rows and columns": reordered(),
    "more columns": table([[*row, "see, mail", "7\nlines"] for row in ROWS], [*TITLES, "note", "ticket"]),
    "names with umlauts, not in UTF-8": table(
        [[*row, "Bär; groß"] for row in ROWS], [*TITLES, "given_class"], ";"
    ).encode("cp1252"),
    "empty rows": table([*ROWS, [""] * 5, ["", " "]]) + "\r\n\r\n",
    "numbers of pandas": table([[f"{row[0]}.0", row[1], f"{row[2]}.0", *row[3:]] for row in ROWS]),
    "decimal commas": table([[f"{row[0]},0", row[1], f"{row[2]},0", *row[3:]] for row in ROWS], delimiter=";"),
    "titles in capitals": table(titles=[title.upper() for title in TITLES]),
    "no data set": table([row[:4] for row in ROWS], TITLES[:4]),
    "a row added by hand": table([*ROWS[:2], ["5", "", "", "drop", ""]]),
    "only what is needed": table([[row[0], row[3], row[2]] for row in ROWS], ["index", "decision", "suggested_label"]),
    "nothing decided in a row": table([*ROWS, ["1", "1", "0", "", MARK]]),
}


@pytest.mark.parametrize("kind", SPREADSHEETS)
def test_what_spreadsheets_make_of_it_is_read(tmp_path, kind):
    assert decided(fitted(written(tmp_path, SPREADSHEETS[kind]))) == WANTED


def without(column):
    at = TITLES.index(column)
    return table([row[:at] + row[at + 1 :] for row in ROWS], TITLES[:at] + TITLES[at + 1 :])


def with_row(*row, line=3):
    rows = [list(one) for one in ROWS]
    rows[line - 2] = list(row)
    return table(rows)


CLASSES = [*TITLES, "given_class", "suggested_class"]
REFUSED = {
    "unknown decision": (with_row("0", "2", "2", "hold", MARK), "line 3: expected decision to be keep, drop or relab"),
    "index twice": (with_row("4", "1", "1", "keep", MARK), "line 3: expected each index once, but 4 is in line 2 too"),
    "index out of range": (with_row("6", "2", "2", "keep", MARK), r"line 3: expected index to lie in \[0, 6\), .* 6"),
    "no index": (with_row("", "2", "2", "keep", MARK), "line 3: expected index to be the number of a sample"),
    "negative index": (with_row("-1", "2", "2", "keep", MARK), "line 3: expected index to be the number of a sample"),
    "a thousand, or one": (with_row("1,000", "2", "2", "keep", MARK), "line 3: .* but it is '1,000'"),
    "no such class": (with_row("0", "2", "4", "relabel", MARK), r"line 3: expected suggested_label to be in \[0, 4\)"),
    "no class": (with_row("0", "2", "", "relabel", MARK), "line 3: expected suggested_label to be one class"),
    "a class by name": (with_row("0", "2", "dog", "relabel", MARK), "line 3: expected suggested_label to be the class"),
    "several classes": (with_row("0", "2", "1 3", "relabel", MARK), "line 3: expected suggested_label to be one class"),
    "the same label": (with_row("0", "2", "2", "relabel", MARK), "line 3: expected another suggested_label than the"),
    "another length": (table().replace("n6-", "n7-"), "to this training set of 6 samples.* another .7 samples"),
    "other content": (table().replace(MARK, "n6-ffffff030405"), "to another .as many, but 50% of those compared"),
    "two data sets": (with_row("0", "2", "2", "keep", "n6-"), "line 3: expected all rows to belong to one dataset"),
    "a broken mark": (with_row("0", "2", "2", "keep", "06:00:00"), "line 3: expected dataset as written by"),
    "no title": (table(titles=["a", "b", "c", "d", "e"]), "line 1: expected titles with 'index' and 'decision'"),
    "no decisions": (without("decision"), "line 1: expected titles with 'index' and 'decision' .* found 'index,given"),
    "no suggestions": (without("suggested_label"), "line 2: expected suggested_label .* but it is 'no such column'"),
    "a title twice": (table(titles=["index", "given_label", "decision", "decision", "x"]), "'decision' is there twice"),
    "empty": ("", "line 1: expected titles"),
    "only Excel's line": ("sep=,", "line 2: expected titles"),
    "a workbook": (b"PK\x03\x04...", "but it is a workbook; save it as CSV"),
    "behind a cell of two lines": (
        table([[*ROWS[0], "a\r\nb"], ["0", "2", "2", "no", MARK, ""]], [*TITLES, "note"]),
        "line 4: expected decision",
    ),
    "a number but not its name": (
        table([["1", "2", "0", "drop", "", "emu", "cat"], ["2", "1", "3", "relabel", "", "dog", "fox"],
               ["3", "1", "2", "relabel", "", "dog", "fox"]], CLASSES),
        "line 4: expected suggested_class to be 'emu', the name of class 2 in line 2, but it is 'fox'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_meant_is_refused_with_its_line(tmp_path, kind):
    content, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        fitted(written(tmp_path, content))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Expected review to be a file of decisions, .*nowhe"):
        read_review(tmp_path / "nowhere.csv")


def test_other_content_is_let_through_where_little_of_it_differs_or_it_is_not_to_be_compared(tmp_path):
    assert decided(fitted(written(tmp_path, table().replace(MARK, "n6-ff0102030405")))) == WANTED
    assert decided(fitted(written(tmp_path, table().replace(MARK, "n6-ffffffffffff")), content=False)) == WANTED
    # Under random augmentation only the length is known.
    assert decided(fitted(written(tmp_path, table().replace(MARK, "n6-")))) == WANTED
    with pytest.raises(ValueError, match=r"another .7 samples"):
        fitted(written(tmp_path, table().replace("n6-", "n7-")), content=False)


def test_a_name_that_is_emptied_does_not_count(tmp_path):
    rows = [["1", "2", "0", "drop", "", "emu", "cat"], ["3", "1", "2", "relabel", "", "dog", ""]]
    assert decided(fitted(written(tmp_path, table(rows, CLASSES)))) == {1: (DROP, -1), 3: (RELABEL, 2)}


def test_labels_are_compared_with_those_that_the_file_says_were_given(tmp_path):
    review = fitted(written(tmp_path, table([*ROWS, ["1", "", "", "drop", ""]])))
    positions = review.compared()
    assert review.index[positions].tolist() == [4, 0, 5]
    review.check_labels(positions, torch.tensor([1, 2, 0]))
    # One that is to be ignored is none.
    review.check_labels(positions, torch.tensor([1, -1, 0]))
    with pytest.raises(ValueError, match="line 3: expected given_label to be the label of sample 0, 3, but it is 2"):
        review.check_labels(positions, torch.tensor([1, 3, 0]))


def test_of_very_many_labels_sixteen_are_compared(tmp_path):
    rows = [[str(k), "1", "2", "drop", ""] for k in range(1000)]
    review = fitted(written(tmp_path, table(rows)), total=1000, fingerprint="")
    assert review.compared().tolist()[:2] == [0, 66]
    assert len(review.compared()) == 16
    assert review.compared()[-1] == 999


def test_laid_over_the_labels(tmp_path):
    review = fitted(written(tmp_path, table()))
    found = review.apply_to(torch.tensor([2, 0, 0, 0, 1, 0]))
    assert found.decision.tolist() == [KEEP, UNDECIDED, UNDECIDED, UNDECIDED, RELABEL, DROP]
    assert found.new_label.tolist() == [-1, -1, -1, -1, 3, -1]
    assert found.stale == 0


def test_a_decision_about_another_label_does_not_count(tmp_path):
    found = fitted(written(tmp_path, table())).apply_to(torch.tensor([2, 0, 0, 0, 3, 0]))
    assert found.decision.tolist() == [KEEP, UNDECIDED, UNDECIDED, UNDECIDED, UNDECIDED, DROP]
    assert found.new_label.tolist() == [-1] * 6
    assert found.stale == 1


def test_several_labels(tmp_path):
    rows = [["0", "0 2", "0", "relabel", MARK], ["1", "", "1 2", "relabel", MARK], ["2", "1", "", "relabel", MARK]]
    review = fitted(written(tmp_path, table(rows)), labels=3, classes=3)
    assert review.new_label.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    label = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0]])
    review.check_labels(review.compared(), label[:3])
    label[1, 2] = -1  # to be ignored: it stays so
    found = review.apply_to(label)
    assert found.new_label.tolist() == [[1, 0, 0], [0, 1, -1], [0, 0, 0], *[[-1] * 3] * 3]
    with pytest.raises(ValueError, match=r"line 2: expected given_label .* sample 0, .1, 1, 1., but it is .1, 0, 1."):
        review.check_labels(review.compared(), torch.tensor([[1, 1, 1], [0, 0, 0], [0, 1, 0]]))
    with pytest.raises(ValueError, match=r"line 3: expected suggested_label to be in \[0, 2\)"):
        fitted(written(tmp_path, table(rows)), labels=2, classes=2)


def test_the_state_and_whether_two_agree(tmp_path):
    review = fitted(written(tmp_path, table()))
    again = Review(**review.state_dict())
    assert again.equals(review)
    assert fitted(written(tmp_path, reordered())).equals(review)
    assert not fitted(written(tmp_path, table(ROWS[:2]))).equals(review)
    assert not fitted(written(tmp_path, table().replace("DROP", "keep"))).equals(review)
    assert not fitted(written(tmp_path, table().replace("4,1,3", "4,1,2"))).equals(review)
    assert review.counts().endswith("suspects.csv: keep 1, drop 1, relabel 1")


def test_a_table_of_clean_samples_has_nothing_to_decide(tmp_path):
    partition = make_partition(torch.full((6,), 0.9), torch.zeros(6, dtype=torch.int64))
    partition.to_csv(tmp_path / "suspects.csv")
    review = fitted(tmp_path / "suspects.csv")
    assert len(review) == 0
    assert len(review.compared()) == 0
    assert (review.apply_to(torch.zeros(6, dtype=torch.int64)).decision == UNDECIDED).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfei", "cannot be read"),
        (b"index,decision\n1," + b"x" * 200_000 + b"\n", r"cannot be read \(field larger"),
        (b"index,decision\n" + b"9" * 5000 + b",keep\n", "expected index to be the number of a sample"),
        (b"index,decision,given_label,suggested_label\n1,relabel,9," + b"9" * 30, "to be the class to train with"),
        (b"sep=", "expected titles with 'index' and 'decision'"),
        (b'sep="\nindex"decision\n', "expected titles with 'index' and 'decision'"),
        (b"\0" * 100, "expected titles with 'index' and 'decision'"),
        (b"", "expected titles with 'index' and 'decision'"),
    ],
)
def test_what_is_no_table_is_refused_with_its_name(content, message, tmp_path):
    with pytest.raises(ValueError, match=rf"suspects.csv.*{message}"):
        read_review(written(tmp_path, content))


def test_a_table_with_wrong_bytes_is_read_or_refused_with_its_name(tmp_path):
    content, random, said = table().encode(), np.random.default_rng(0), []
    for _ in range(300):
        broken = bytearray(content)
        for place in random.integers(len(content), size=int(random.integers(1, 4))):
            broken[place] = int(random.integers(256))
        path = written(tmp_path, bytes(broken))
        try:
            fitted(path)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 100
    assert all("suspects.csv" in message for message in said)


@pytest.mark.parametrize("edited", ["frog", "nosuch"])
def test_a_class_name_that_was_edited_without_its_number_is_refused(edited, tmp_path):
    titles = [*TITLES, "given_class", "suggested_class"]
    rows = [["1", "0", "2", "", MARK, "cat", "bird"], ["2", "3", "0", "relabel", MARK, "frog", edited]]
    with pytest.raises(ValueError, match="expected suggested_class to be 'cat', the name of class 0 in line 2"):
        read_review(written(tmp_path, table(rows, titles)))


def test_a_decision_beyond_the_titles_is_refused(tmp_path):
    with pytest.raises(ValueError, match="line 2: expected 5 cells, one for each title, but 'drop' comes after"):
        read_review(written(tmp_path, table([["1", "0", "2", "", MARK, "drop"]])))


def test_two_labels_separated_by_a_comma_are_not_one_with_a_decimal_place(tmp_path):
    row = [["4", "1", "3,0", "relabel", MARK]]
    with pytest.raises(ValueError, match="numbers separated by spaces"):
        read_review(written(tmp_path, table(row)))
    (found,) = read_review(written(tmp_path, table(row, delimiter=";"))).rows
    assert found.new == (3,)


def test_a_stream_is_decided_by_keys_whatever_the_row_numbers(tmp_path):
    titles = ["index", "key", "decision"]
    rows = [["3", "a", "drop"], ["3", "b", "keep"]]
    assert [row.key for row in read_review(written(tmp_path, table(rows, titles))).rows] == ["a", "b"]
    with pytest.raises(ValueError, match="expected each key once, but a is in line 2 too"):
        read_review(written(tmp_path, table([["3", "a", "drop"], ["5", "a", "keep"]], titles)))


@pytest.mark.parametrize(
    "content", ["Reviewed by Ann,,\n" + table(), b"PK\x03\x04", "index,index,decision\n1,1,drop\n"]
)
def test_nothing_is_written_over_a_file_that_cannot_be_read(content, tmp_path):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match="exists and cannot be read as one"):
        check_undecided(path)
