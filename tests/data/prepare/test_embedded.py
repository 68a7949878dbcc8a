"""The embedded corpus: code without its documentation, the documentation, and nothing lost between."""

import ast
from pathlib import Path

import pyarrow.parquet

from bigmodel.data.prepare import corpus, embedded

MODULE = '''\
"""Module words."""

import os


class A:
    """Class words,

    twice: é.
    """

    x = 1

    def method(self):
        """Method words."""

    async def other(self):
        """Other words."""
        return """not documentation"""


def short(): "stays"
'''


def test_documentation_strings_leave_the_code_and_nothing_else_does() -> None:
    assert embedded.strip_docstrings(MODULE) == (
        "import os\n\n\nclass A:\n    x = 1\n\n    def method(self):\n        pass\n\n    async def other(self):\n"
        '        return """not documentation"""\n\n\ndef short(): "stays"\n'
    )


def test_documentation_is_one_document_with_qualified_names() -> None:
    assert embedded.module_documentation(ast.parse(MODULE), "m").startswith(
        "m\n\nModule words.\n\nm.A\n\nClass words,\n\ntwice: é.\n\nm.A.method\n\nMethod words.\n\nm.A.other\n"
    )


def test_the_library_without_documentation_strings_is_the_same_program() -> None:
    def without_documentation(tree: ast.AST) -> str:
        for node in ast.walk(tree):
            if isinstance(node, embedded.Documented) and ast.get_docstring(node) is not None:
                keeps = node.body[0].lineno == getattr(node, "lineno", 0)  # shares the line of its `def`
                empty = len(node.body) == 1 and not isinstance(node, ast.Module)
                node.body = node.body if keeps else ([ast.Pass()] if empty else node.body[1:])
        return ast.dump(tree)

    modules = [(path, content) for path, content in embedded.standard_library() if path < "c"]
    assert len(modules) > 50
    for path, content in modules:
        documents = embedded.documents_of_module(path, content)
        assert documents is not None, path
        code = documents[0][2]
        assert without_documentation(ast.parse(code)) == without_documentation(ast.parse(content)), path


def test_the_embedded_corpus_holds_code_and_documentation_under_the_module_as_key(tmp_path: Path) -> None:
    modules = [("m.py", MODULE.replace("Module words.", "Module words. " * 20).encode()), ("bad.py", b"def (:\n")]
    left_out = embedded.write_embedded_corpus(tmp_path / "corpus", modules)
    assert left_out["code"] == {
        "not_parsed": {"documents": 1, "bytes": 7},
        "heading_only": {"documents": 0, "bytes": 0},
    }
    sources = embedded.embedded_sources(tmp_path / "corpus")
    assert [source.name for source in sources] == ["code", "docs"]
    rows = [list(corpus.read_unit(corpus.plan_units(source)[0])) for source in sources]
    assert [key for source in rows for _, key in source] == ["m.py", "m.py"]
    assert "Class words" in str(rows[1])
    assert "Class words" not in str(rows[0])


def test_the_standard_library_is_there_without_tests_and_build_settings() -> None:
    paths = [path for path, _ in embedded.standard_library()]
    assert {"json/decoder.py", "pydoc_data/topics.py"} <= set(paths)
    assert not any("/test/" in f"/{path}" or "site-packages" in path or "_sysconfigdata" in path for path in paths)
    assert paths == sorted(paths)
    assert len(paths) > 400


FUNCTIONS = b'''"""About the module."""

def area(width, height):
    """Give the area of a rectangle.

    Both sides in metres.
    """
    return width * height


class Box:
    """Not a function."""

    def open(self):
        \'\'\'Open
        the lid.\'\'\'
        self.lid = None

    def only_documented(self):
        """Nothing else."""

    def undocumented(self):
        return 1
'''


def test_pairs_are_functions_without_their_documentation_and_their_entries_in_a_reference() -> None:
    assert embedded.function_pairs(FUNCTIONS.decode()) == [
        ("def area(width, height):\n    return width * height\n", "area(width, height): Give the area of a rectangle."),
        ("def open(self):\n    self.lid = None\n", "open(): Open the lid."),
    ]


def test_an_entry_has_all_arguments_in_their_order_and_nothing_else_of_the_signature() -> None:
    text = 'def f(a, /, b: int = 1, *rest, key=lambda inner: inner, **more) -> int:\n    "Do\\n\\nit."\n    return 1\n'
    assert [entry for _, entry in embedded.function_pairs(text)] == ["f(a, b, rest, key, more): Do"]


def test_a_method_with_text_at_the_margin_is_dedented_too() -> None:
    text = 'class A:\n    def f(self):\n        """Say it."""\n        return """\nit\n"""\n'
    assert embedded.function_pairs(text) == [('def f(self):\n    return """\nit\n"""\n', "f(): Say it.")]


def test_documentation_that_shares_its_line_with_code_gives_no_pair() -> None:
    """It cannot be taken out of the source, which would then hold its own target."""
    assert embedded.function_pairs('def f(): "Say it."; return 1\n') == []


def test_pairs_are_written_with_their_module_as_key(tmp_path: Path) -> None:
    left_out = embedded.write_embedded_pairs(tmp_path, [("a/boxes.py", FUNCTIONS), ("broken.py", b"def (")])
    assert left_out == {"summaries": {"not_parsed": {"documents": 1, "bytes": 5}}}
    (source,) = embedded.pair_sources(tmp_path)
    rows = pyarrow.parquet.read_table(source.files[0]).to_pylist()
    assert source.columns == ("text", "target")
    assert [row["key"] for row in rows] == ["a/boxes.py"] * 2
    assert rows[1]["target"] == "open(): Open the lid."


def test_the_standard_library_gives_pairs_enough_to_train_on() -> None:
    modules = [one for one in embedded.standard_library() if one[0].startswith(("asyncio/", "email/", "json/"))]
    pairs = [pair for _, content in modules for pair in embedded.function_pairs(embedded.decode_module(content))]
    assert len(pairs) > 300
    assert all(source.removeprefix("async ").startswith(f"def {entry.split('(')[0]}") for source, entry in pairs)
    assert not any('"""' in source.split("\n")[1] for source, _ in pairs)
