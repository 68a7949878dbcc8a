"""Which rows are kept, for what reason others are not, and on which side of the split they fall."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigmodel.config.settings import DecontaminationSettings, PrepareSettings, UserError
from bigmodel.data.prepare import cleaning, corpus
from bigmodel.data.prepare.cleaning import CONTAMINATED, DUPLICATE, KEPT, TOO_LONG, TOO_SHORT, Scan
from tests.data.prepare.test_corpus import TEXTS, units_of, write_jsonl, write_parquet


def scanned(file: Path, **changes: Any) -> list[Scan]:
    settings = PrepareSettings(**({"validation_share": 0.3} | changes))
    return [cleaning.scan_unit(unit, settings) for unit in units_of(file)]


def test_rows_are_kept_or_dropped_for_one_reason_and_add_up_in_documents_and_bytes(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "a.jsonl", ["one", None, "", " \n", "two", "one", "\ud800", "thréé", "x", "much too long"]
    )
    scans = scanned(file, min_characters=2, max_characters=9)
    cleaning.mark_duplicates(scans)
    documents, num_bytes = cleaning.count_reasons(scans)
    malformed = len(b'{"text": "\\ud800", "id": 7}\n')
    assert documents == {
        "read": 10,
        "kept": 3,
        "null": 1,
        "empty": 2,
        "malformed": 1,
        "too_short": 1,
        "too_long": 1,
        "contaminated": 0,
        "duplicate": 1,
    }
    assert num_bytes == {
        "read": 3 + 2 + 3 + 3 + malformed + 7 + 1 + 13,
        "kept": 3 + 3 + 7,
        "null": 0,
        "empty": 2,
        "malformed": malformed,
        "too_short": 1,
        "too_long": 13,
        "contaminated": 0,
        "duplicate": 3,
        "cleaned": 0,
    }
    assert [record.place for scan in scans for record in scan.malformed] == ["byte 146"]


def test_cleaning_changes_what_the_settings_say_and_its_bytes_are_counted(tmp_path: Path) -> None:
    decomposed, control = "e\u0301te\u0301", "a\x00b\x1b[0m\x7f\tc\r\n\x85d"
    off = PrepareSettings()
    assert [cleaning.clean(text, off) for text in (decomposed, control)] == [decomposed, control]
    assert cleaning.clean(decomposed, PrepareSettings(unicode_nfc=True)) == "été"
    assert cleaning.clean(control, PrepareSettings(remove_control_characters=True)) == "ab[0m\tc\r\nd"
    scans = scanned(
        write_jsonl(tmp_path / "a.jsonl", [decomposed, "été", "\x00"]), unicode_nfc=True, remove_control_characters=True
    )
    assert cleaning.mark_duplicates(scans).tolist() == [1]  # equal after cleaning
    documents, num_bytes = cleaning.count_reasons(scans)
    assert (documents["kept"], documents["duplicate"], documents["empty"]) == (1, 1, 1)
    assert (num_bytes["read"], num_bytes["kept"], num_bytes["cleaned"]) == (7 + 5 + 1, 5, 2)


def test_lengths_are_in_characters_and_the_limits_belong_to_what_is_kept() -> None:
    settings = PrepareSettings(min_characters=3, max_characters=4)
    verdicts = [cleaning.judge((text,), settings)[0] for text in ("éé", "ééé", "éééé", "ééééé")]
    assert verdicts == [TOO_SHORT, KEPT, KEPT, TOO_LONG]
    assert cleaning.judge(("long enough", "x"), PrepareSettings(min_characters=2))[0] == TOO_SHORT  # of a pair: both
    with pytest.raises(ValueError, match=r"prepare.max_characters = 2 is below prepare.min_characters = 3"):
        PrepareSettings(min_characters=3, max_characters=2)


def test_a_text_is_kept_once_over_all_sources_and_the_first_stays(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", ["x", "y"])
    second = write_jsonl(tmp_path / "b.jsonl", ["y", "z", "x", "z"])
    scans = [*scanned(first), *scanned(second)]
    duplicates = cleaning.mark_duplicates(scans)
    assert scans[0].status.tolist() == [KEPT, KEPT]
    assert scans[1].status.tolist() == [DUPLICATE, KEPT, DUPLICATE, DUPLICATE]
    assert duplicates.tolist() == [2, 4, 5]
    again = scanned(second)[0]
    cleaning.mark_rows(again, 2, duplicates)
    assert again.status.tolist() == scans[1].status.tolist()
    assert again.kept_bytes.tolist() == [0, 1, 0, 0]


def test_a_pair_is_a_duplicate_only_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    pairs = [("x", "y"), ("x", "z"), ("xy", ""), ("x", "y"), ("y", "x")]
    file.write_text("".join(json.dumps({"a": a, "b": b}) + "\n" for a, b in pairs))
    units = units_of(file, column="a", target="b")
    scan = cleaning.scan_unit(units[0], PrepareSettings())
    assert cleaning.mark_duplicates([scan]).tolist() == [3]
    assert scan.kept_bytes.tolist() == [2, 2, 0, 0, 2]


def test_a_document_that_shares_a_run_of_words_with_evaluation_text_is_dropped(tmp_path: Path) -> None:
    evaluation = tmp_path / "exam.jsonl"
    questions = [{"question": "What is the capital of France, and why?"}, {"question": "too short"}]
    evaluation.write_text("".join(json.dumps(question) + "\n" for question in questions))
    against = DecontaminationSettings(files=[str(evaluation)], column="question", ngram=5)
    hashes = cleaning.evaluation_hashes(against)
    assert len(hashes) == 4  # 8 words
    settings = PrepareSettings(decontaminate=against)
    cases = {
        "Once asked: WHAT is the\ncapital -- of Spain": CONTAMINATED,  # five words in a row, in other clothes
        "what is the capital": KEPT,  # four
        "is what the capital of France": KEPT,  # the same words in another order
        "the capital of France and": CONTAMINATED,
        "too short": KEPT,
    }
    found = {text: cleaning.judge((text,), settings, hashes)[0] for text in cases}
    assert found == cases
    assert cleaning.judge(("fine text", "the capital of france and"), settings, hashes)[0] == CONTAMINATED


def test_evaluation_text_and_documents_are_compared_in_the_same_form(tmp_path: Path) -> None:
    evaluation = tmp_path / "exam.txt"
    composed = "Le caf\u00e9 \u00e0 la cr\u00e8me de la \ufb01n"
    for there, here in (
        (composed, unicodedata.normalize("NFD", composed)),
        (unicodedata.normalize("NFD", composed), composed),
        (composed.replace("cr", "c\x00r"), unicodedata.normalize("NFKC", composed)),
    ):
        evaluation.write_text(there)
        against = DecontaminationSettings(files=[str(evaluation)], ngram=8)
        settings = PrepareSettings(decontaminate=against)
        assert cleaning.judge((here,), settings, cleaning.evaluation_hashes(against))[0] == CONTAMINATED


def test_an_evaluation_file_that_compares_with_nothing_is_refused(tmp_path: Path) -> None:
    whole = write_jsonl(tmp_path / "whole.jsonl", ["What is the capital of France?"])
    for name, values, message in (
        (
            "list.jsonl",
            [["What is the capital of France?"], 7],
            r"2 malformed .*drop them\n .*list\.jsonl: line 1: 'text' is an array, not text\n .*: line 2: 'text' is",
        ),
        ("short.jsonl", ["too short", None], r"ngram = 5: .*short\.jsonl has no text of that many words"),
    ):
        file = write_jsonl(tmp_path / name, values)
        with pytest.raises(UserError, match=message):
            cleaning.evaluation_hashes(DecontaminationSettings(files=[str(whole), str(file)], ngram=5))


def test_large_documents_do_not_crowd_the_others_out_of_the_sample() -> None:
    sizes = np.full(1000, 10)
    sizes[500] = 2000
    digests = np.stack([np.roll(np.arange(1000), 499), np.zeros(1000)], axis=1).astype("<u8")  # row 500 is the second
    scan = Scan(np.zeros(1000, np.uint8), digests, np.zeros(1000, bool), sizes, sizes, [])
    assert len(cleaning.choose_sample([scan], 1600)[0]) == 160
    only = Scan(*(array[500:501] for array in (scan.status, digests, scan.validation, sizes, sizes)), [])
    assert cleaning.choose_sample([only], 1600)[0].tolist() == [0]


def test_no_damaged_byte_of_a_file_of_arrays_is_taken_for_whole_or_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    cleaning.write_arrays(path, status=np.arange(5))
    good = path.read_bytes()
    assert cleaning.is_whole(path)
    found_whole = 0
    for place in range(len(good)):
        for bit in (1, 8, 128):
            path.write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])
            if cleaning.is_whole(path):  # a time or a comment: then what it holds is right
                found_whole += 1
                with np.load(path) as arrays:
                    assert {name: arrays[name].tolist() for name in arrays} == {"status": [0, 1, 2, 3, 4]}
    assert found_whole < len(good)  # of three times as many


def test_adding_documents_moves_none_between_train_and_validation(tmp_path: Path) -> None:
    def sides(texts: list[str]) -> dict[str, bool]:
        scan = scanned(write_jsonl(tmp_path / "a.jsonl", texts))[0]
        return dict(zip(texts, scan.validation.tolist(), strict=True))

    few = sides(TEXTS[:20])
    many = sides(TEXTS[::-1])
    assert all(many[text] == side for text, side in few.items())
    assert 4 <= sum(many.values()) <= 20  # 30% of 40, so neither side is empty by accident


def test_documents_of_one_key_are_on_the_same_side(tmp_path: Path) -> None:
    sides = {cleaning.is_validation("json/decoder.py", bytes(16) + bytes([n * 12]) * 8, 0.5) for n in range(20)}
    assert len(sides) == 1
    by_text = {cleaning.is_validation(None, bytes(16) + bytes([n * 12]) * 8, 0.5) for n in range(20)}
    assert by_text == {True, False}


def test_a_sample_is_of_the_train_split_within_its_limit_and_does_not_depend_on_order(tmp_path: Path) -> None:
    def sample(texts: list[str], limit: int) -> set[str]:
        file = write_parquet(tmp_path / "a.parquet", texts)
        scans = scanned(file)
        chosen = cleaning.choose_sample(scans, limit)
        assert not any(scan.validation[rows].any() for scan, rows in zip(scans, chosen, strict=True))
        return {
            str(row[0])
            for unit, rows in zip(units_of(file), chosen, strict=True)
            for number, (row, _) in enumerate(corpus.read_unit(unit))
            if number in rows and isinstance(row, tuple)
        }

    some = sample(TEXTS, 1000)
    assert some == sample(TEXTS[::-1], 1000)
    assert 0 < sum(len(text.encode()) for text in some) <= 1000
    assert some < sample(TEXTS, 10**9)
    assert len(sample(TEXTS, 1)) == 1


def test_a_scan_is_read_as_it_was_written_and_a_damaged_file_is_seen(tmp_path: Path) -> None:
    scan = scanned(write_jsonl(tmp_path / "a.jsonl", ["one", None, 7, "two"]))[0]
    path = tmp_path / "scan.npz"
    scan.write(path)
    again = Scan.read(path)
    for name in ("status", "digests", "validation", "read_bytes", "kept_bytes"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scan, name), strict=True)
    assert again.malformed == scan.malformed != []
    assert cleaning.is_whole(path)
    content = path.read_bytes()
    place = content.index(scan.digests.tobytes())
    for damaged in (content[:-1], content[: len(content) // 2], b"", content[:place] + b"?" + content[place + 1 :]):
        path.write_bytes(damaged)
        assert not cleaning.is_whole(path)
    path.unlink()
    assert not cleaning.is_whole(path)


def test_no_rows_are_no_error() -> None:
    assert cleaning.mark_duplicates([]).tolist() == []
    sizes = np.zeros(0, np.int64)
    empty = Scan(np.zeros(0, np.uint8), np.zeros((0, 2), np.uint64), np.zeros(0, bool), sizes, sizes, [])
    assert cleaning.mark_duplicates([empty]).tolist() == []
    assert cleaning.count_reasons([empty])[0]["read"] == 0
