"""Of JSON only the wanted columns decide; arrays and objects over several lines are read as lines are."""

import json
from pathlib import Path

import pytest

from bigmodel.config.settings import UserError
from bigmodel.data.prepare import compression, formats
from bigmodel.data.prepare.rows import Malformed
from tests.data.prepare.test_corpus import rows_of, texts_of

DIGITS = "1" * 5000
ODD = [  # each with the column's text "x"
    '{"text": "x", "other": DIGITS}'.replace("DIGITS", DIGITS),
    '{"other": {"a": [-DIGITS, DIGITS.5, 1e999, NaN, Infinity]}, "text": "x"}'.replace("DIGITS", DIGITS),
    '{"text": "y", "text": "x"}',
    '{"other": %s, "text": "x"}' % ("[" * 5000 + "]" * 5000),
    '{"other": %s, "text": "x"}' % ('{"a": [' * 2000 + '"]}\\"[{"' + "]}" * 2000),
]


def test_only_the_wanted_column_decides_about_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text("\n".join(ODD))
    array.write_text(f"[{','.join(ODD)}]")
    assert texts_of(lines) == texts_of(array) == ["x"] * len(ODD)
    monkeypatch.setattr(compression, "BUFFER_BYTES", 1000)
    assert texts_of(array) == ["x"] * len(ODD)


def test_a_number_is_no_text_and_what_is_wrong_deep_inside_is_found(tmp_path: Path) -> None:
    deep = "[" * 3000 + "%s" + "]" * 3000
    cases = [
        ('{"text": DIGITS}'.replace("DIGITS", DIGITS), "'text' is a number, not text"),
        ('{"text": NaN}', "'text' is a number, not text"),
        ('{"text": {}}', "'text' is an object, not text"),
        ("[1]", "an array, not an object"),
        ('"x"', "a string, not an object"),
        ("null", "null, not an object"),
        ("true", "true, not an object"),
        ('{"text": "x"', "not valid JSON: Expecting ',' delimiter at the end of the line: it is cut"),
        ('{"text": "x", "other": %s}' % (deep % "tru"), "not valid JSON: Expecting value"),
        ('{"text": "x", "other": %s}' % (deep % "]"), "not valid JSON: "),
        ('{"text": "x", "other": %s}' % (deep % "[" * 2), "not valid JSON: "),
        ('{"text": ]]]]}' + "[" * 3000, "not valid JSON: Expecting value at character 10 of 3014"),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(line for line, _ in cases))
    for found, (_, reason) in zip(texts_of(tmp_path / "a.jsonl"), cases, strict=True):
        assert isinstance(found, Malformed)
        assert found.reason.startswith(reason)
        assert "recursion" not in found.reason


@pytest.mark.parametrize("buffer_bytes", [1, 7, 64, 1 << 20])
def test_an_array_is_read_as_the_lines_with_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int
) -> None:
    monkeypatch.setattr(compression, "BUFFER_BYTES", buffer_bytes)
    values = [
        {"text": f'{number} été \U0001f600 \\ " [,] {{' * number, "n": [number, {"a": None}]} for number in range(9)
    ]
    values += [[1], 12345, {"text": 5}, {"text": None}, {"text": "last"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    expected = [text.reason if isinstance(text, Malformed) else text for text in texts_of(tmp_path / "a.jsonl")]
    file = tmp_path / "a.json"
    for text in (
        json.dumps(values),
        "\ufeff" + json.dumps(values, indent=2, ensure_ascii=False) + "\n ",
        "\n".join(json.dumps(value, indent=1) for value in values),
    ):
        file.write_text(text)
        found = texts_of(file)
        assert [text.reason if isinstance(text, Malformed) else text for text in found] == expected
        assert [text.place for text in found if isinstance(text, Malformed)] == ["value 10", "value 11", "value 12"]


def test_numbers_cut_anywhere_by_the_buffer_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("[" + "-2.5e-80, 12345, " * 20 + '{"text": "x"}]')
    for buffer_bytes in range(1, 20):
        monkeypatch.setattr(compression, "BUFFER_BYTES", buffer_bytes)
        *numbers, last = texts_of(tmp_path / "a.json")
        assert (len(numbers), last) == (40, "x")
        assert all(isinstance(number, Malformed) for number in numbers)


def test_a_json_file_with_an_object_per_line_is_read_and_cut_as_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content, kind in (
        (b'\xef\xbb\xbf{"text": "x"}\n{"text": "x"}\n', "jsonl"),
        (b'\n {"text": "x"}', "jsonl"),
        (b'{"text": "x\n{"text": "x"}\n', "jsonl"),
        (b'{"text": "\xff"}\n{"text": "x"}\n', "jsonl"),
        (b'  [\n{"text": "x"}\n]', "json"),
        (b'{\n"text": "x"\n}', "json"),
        (b"[]", "json"),
    ):
        file.write_bytes(content)
        assert formats.recognize(str(file)).kind == kind
    file.write_bytes(b'{"text": "x\n{"text": "x"}\n')
    malformed, text = texts_of(file)
    assert isinstance(malformed, Malformed)
    assert text == "x"


def test_an_array_that_is_not_json_or_not_whole_is_named_with_the_place(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content, reason in (
        ('[{"text": "x"}, {"text": "y"', "Expecting ',' delimiter at character 29"),
        ('[{"text": "x"}', "no comma or end after a value of its array at character 15"),
        ('[{"text": "x"} {"text": "y"}]', "no comma or end after a value of its array at character 16"),
        ('[{"text": "x"}] {"text": "y"}', "its array is followed by other text at character 17"),
        ('[{"text": "x"}, {text: 5}' + " " * 100 + "]", "Expecting property name enclosed in double quotes at char"),
        ('{\n"text": "x"', "Expecting ',' delimiter at character 14"),
    ):
        file.write_text(content)
        with pytest.raises(UserError) as error:
            rows_of(file)
        assert f"{file}: cannot be read: not valid JSON: {reason}" in str(error.value)


def test_bytes_that_are_not_utf8_spoil_their_value_alone(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"text": "x"}, {"text": "\xe9"}, {"text": "\\ud800"}, {"text": "z"}]')
    first, bad, half, last = texts_of(tmp_path / "a.json")
    assert (first, last) == ("x", "z")
    assert bad == Malformed(str(tmp_path / "a.json"), "value 2", "not UTF-8", len(b'{"text": "\xe9"}'))
    assert isinstance(half, Malformed)
    assert "half of a surrogate pair" in half.reason


def test_a_column_inside_one_that_is_always_null_is_null(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"page": null, "n": 1}\n{"n": 2}\n')
    assert texts_of(file, column="page.body.text") == [None, None]
    assert texts_of(file, column="page") == [None, None]
    for last in ("", '{"page": {"id": 3}, "n": 3}\n{"page": null, "n": null}\n'):
        file.write_text(file.read_text() + last)
        column = "page.text" if last else "n.text"
        with pytest.raises(UserError, match=rf"has no column '{column}'; it has 'page', 'n'"):
            texts_of(file, column=column)
