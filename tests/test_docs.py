"""The documents say what is: links, paths, run files, commands and generated references are those of the tree."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main

from bigmodel.__main__ import app
from bigmodel.config.deepspeed_json import Source
from bigmodel.config.settings import Section, Settings
from bigmodel.launcher.cluster import Cluster
from tools import write_messages, write_settings_reference
from tools.ablation_variants import from_file

REPOSITORY = Path(__file__).parents[1]
OURS = ("bigmodel", "kernels", "launcher", "tools", "tests", "configs", "docs", "benchmarks", "findings")
FENCE = re.compile(r"^([ ]*)```([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
HISTORY = ("CHANGELOG.md", "benchmarks/README.md")  # they also speak of what is no more


class Block(NamedTuple):
    document: str
    language: str
    title: str
    text: str


def documents() -> list[Path]:
    folders = [path for name in (*OURS, ".") for path in (REPOSITORY / name).glob("*.md" if name == "." else "**/*.md")]
    return sorted(set(folders))


def name_of(document: Path) -> str:
    return document.relative_to(REPOSITORY).as_posix()


def blocks(*languages: str) -> list[Block]:
    found = []
    for document in documents():
        for match in FENCE.finditer(document.read_text(encoding="utf-8")):
            language, _, rest = match[2].strip().partition(" ")
            title = rest.removeprefix("title=").strip('"')
            found.append(Block(name_of(document), language, title, textwrap.dedent(match[3])))
    return [block for block in found if block.language in languages]


def prose(document: Path) -> str:
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub and mkdocs both make them of plain words."""
    titles = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(document: Path) -> Iterator[str]:
    for pair in re.findall(r'\]\(([^)\s]+)\)|\bsrc(?:set)?="([^"\s]+)"', prose(document)):
        target = "".join(pair)
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (document.parent / path).resolve() if path else document
        if not file.exists():
            yield f"{name_of(document)}: {target}: no such file"
        elif anchor and anchor not in anchors(file):
            yield f"{name_of(document)}: {target}: no such heading"


def named_paths(document: Path) -> Iterator[str]:
    """Paths of this tree in code spans: `bigmodel/data/plan/order.py`, `tests/support/`."""
    for span in re.findall(r"`([^`\n]+)`", prose(document)):
        if re.fullmatch(rf"(?:{'|'.join(OURS)})/[\w./-]*", span) and "NAME" not in span:
            yield span


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_relative_links_lead_somewhere(document: Path) -> None:
    assert list(broken_links(document)) == []


@pytest.mark.parametrize("document", [one for one in documents() if name_of(one) not in HISTORY], ids=name_of)
def test_named_paths_exist(document: Path) -> None:
    assert [path for path in named_paths(document) if not (REPOSITORY / path).exists()] == []


def test_a_broken_link_and_a_wrong_path_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    page = tmp_path / "page.md"
    links = '[a](#a-heading) [b](#another) [c](none.md) <img src="f.png">'
    page.write_text(f"# A heading\n{links} `bigmodel/none.py`\n```\n[d](e)\n```\n")
    anchor, *files = broken_links(page)
    assert anchor == "page.md: #another: no such heading"
    assert files == ["page.md: none.md: no such file", "page.md: f.png: no such file"]
    assert list(named_paths(page)) == ["bigmodel/none.py"]


def model_of(block: Block) -> type[Section]:
    return Cluster if block.title == "cluster.toml" else Settings


@pytest.mark.parametrize("block", blocks("toml"), ids=lambda block: f"{block.document}:{block.text[:24]!r}")
def test_run_files_in_documents_are_valid(block: Block, tmp_path: Path) -> None:
    """Each block by itself: settings that belong together stand together."""
    if block.title == "variants.toml":
        (tmp_path / block.title).write_text(block.text)
        from_file(tmp_path / "run.toml", tmp_path / block.title)
        return
    model_of(block).model_validate(tomllib.loads(block.text))


@pytest.mark.parametrize("block", blocks("json"), ids=lambda block: block.document)
def test_deepspeed_files_in_documents_are_usable(block: Block) -> None:
    source = Source(None)
    source.check(json.loads(block.text))
    source.raise_problems()


def commands() -> list[tuple[str, str]]:
    """(document, command) of every line of a shell block, without comments."""
    found = []
    for block in blocks("sh"):
        lines = block.text.replace("\\\n", " ").splitlines()
        found += [(block.document, " ".join(shlex.split(line, comments=True))) for line in lines]
    return [(document, line) for document, line in found if line]


def mentions() -> list[tuple[str, str]]:
    """(document, command) of every code span that is one; its arguments may be left out."""
    found = []
    for document in documents():
        spans = re.findall(r"`((?:bigmodel|make|python -m \w+) [^`\n]+)`", prose(document))
        found += [(name_of(document), span) for span in spans if "..." not in span]
    return found


def problem(line: str) -> str:
    """What is wrong with a command of ours in a line; empty where nothing is, or where there is none."""
    words = shlex.split(re.split(r" [>|] ", line.replace("$SHORT", "").replace("$?", "0"))[0])
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"the Makefile has no {unknown}" if unknown else ""
    if "-m" in words and words[words.index("-m") + 1].startswith("tools."):
        module = words[words.index("-m") + 1].replace(".", "/")
        return "" if (REPOSITORY / f"{module}.py").exists() else f"no {module}.py"
    if "bigmodel" not in words:
        return ""
    return problem_of_arguments(words[words.index("bigmodel") + 1 :])


def problem_of_arguments(words: list[str]) -> str:
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words:
        name, words = words[0], words[1:]
        inner = command.get_command(command.context_class(command), name)
        if inner is None:
            return f"no command {name}"
        command = inner
    if hasattr(command, "commands"):
        return ""  # a group that is named alone
    try:
        command.make_context("bigmodel", list(words))
    except Exception as error:  # click's own, whose classes typer does not guarantee
        return error.format_message() if hasattr(error, "format_message") else repr(error)
    return ""


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_commands_in_documents_exist(document: Path) -> None:
    name = name_of(document)
    wrong = [(line, problem(line)) for place, line in commands() if place == name and problem(line)]
    if name not in HISTORY:
        told = [(line, problem(line)) for place, line in mentions() if place == name]
        wrong += [(line, said) for line, said in told if said and not said.startswith("Missing argument")]
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bigmodel trane my.toml", "no command trane"),
        ("bigmodel train my.toml --frsh", "--frsh"),
        ("bigmodel train", "RUN.toml"),
        ("srun --x=1 bigmodel launch exec my.toml --sett a=1", "--sett"),
        ("make trane", "trane"),
        ("python -m tools.none", "no tools/none.py"),
        ("torchrun -m bigmodel train my.toml", ""),
    ],
)
def test_wrong_commands_are_seen(line: str, said: str) -> None:
    assert said in problem(line)
    assert bool(said) == bool(problem(line))


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"{block.document}:{block.text[:24]!r}")
def test_examples_in_python_run(block: Block) -> None:
    if block.text.startswith(("import ", "from ")):
        exec(compile(block.text, block.document, "exec"), {})
    else:
        compile(block.text, block.document, "exec")


def test_the_reference_of_settings_is_current() -> None:
    page = write_settings_reference.PAGE.read_text(encoding="utf-8")
    assert page == write_settings_reference.reference(), "run python -m tools.write_settings_reference"


def test_every_message_is_on_the_page_of_messages() -> None:
    page = write_messages.PAGE.read_text(encoding="utf-8")
    assert page == write_messages.page(page), "run python -m tools.write_messages"
    for texts in write_messages.messages().values():
        assert [text for text in texts if text not in page] == []


def test_a_file_with_messages_and_without_a_group_is_seen() -> None:
    with pytest.raises(ValueError, match="is in 0 groups"):
        write_messages.page("<!-- messages: nothing/* -->\n<!-- end -->\n")


def test_the_changelog_names_every_renamed_setting() -> None:
    from bigmodel.config.renamed import RENAMED

    rows = re.findall(r"^  \|.*\|$", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    told = set()
    for row in rows:
        _, _, old, new, _ = row.split("|")
        told |= set(zip(re.findall(r"`(\w+)`", old), re.findall(r"`(\w+)`", new), strict=True))
    assert told == {pair for keys in RENAMED.values() for pair in keys.items()}


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.timeout(900)
def test_the_first_run_of_the_readme_does_what_it_says(tmp_path: Path) -> None:
    """The run file and the commands of README, word for word, on texts of one's own."""
    run_file = next(block for block in blocks("toml") if (block.document, block.title) == ("README.md", "my.toml"))
    lines = next(block for block in blocks("sh") if (block.document, block.title) == ("README.md", "first run")).text
    (tmp_path / "my.toml").write_text(run_file.text)
    (tmp_path / "texts").mkdir()
    modules = sorted(Path(os.__file__).parent.glob("*.py"))[:120]
    texts = [module.read_text(encoding="utf-8", errors="replace")[:6000] for module in modules]
    (tmp_path / "texts" / "part-0.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    printed = {}
    for line in lines.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "bigmodel"
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-4000:])
        printed[words[1]] = done.stdout
    assert printed["generate"].startswith("The ")
    assert {"loss.png", "time.png", "summary.json"} <= {path.name for path in (tmp_path / "runs/mine").iterdir()}
