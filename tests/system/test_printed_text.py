"""Text that is not ours (paths, documents, causes of an end) is printed as it is: nothing is read as rich's markup."""

import ast
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from rich.text import Text

from bigmodel.__main__ import app
from bigmodel.checks import guarantees as check
from bigmodel.checks.audit import Finding
from bigmodel.config.user_error import UserError
from bigmodel.data.prepare.pipeline import live
from bigmodel.launcher.preflight import Finding as PreflightFinding
from bigmodel.launcher.preflight import print_findings
from bigmodel.launcher.watch import print_status
from bigmodel.metrics.progress import LiveLine

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("bigmodel", "launcher", "tools")


# These read markup whatever the console says, or bring a console of their own.
NEVER = ("from_markup", "get_console", "print_json", "Spinner", "Status", "track")


def complaints(source: str) -> Iterator[str]:
    """Every import and call of a file that could read markup or emoji codes, as a sentence."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "rich":
            yield f"line {node.lineno}: rich's own functions read markup; make a Console"
        elif isinstance(node, ast.ImportFrom) and node.module == "rich.prompt":
            yield f"line {node.lineno}: prompts of rich read markup"
        elif isinstance(node, ast.Call):
            yield from (f"line {node.lineno}: {text}" for text in complaints_of_call(node))


def complaints_of_call(node: ast.Call) -> Iterator[str]:
    callee = ast.unparse(node.func)
    name = callee.rpartition(".")[2]
    named = {word.arg: word.value for word in node.keywords}
    off = {word for word, value in named.items() if isinstance(value, ast.Constant) and value.value is False}
    if callee in ("rich.print", "rich.inspect") or callee.endswith(("console.status", "console.input")):
        yield f"{callee} reads markup"
    elif name == "Console":
        yield from (f"Console without {word}=False" for word in ("markup", "emoji") if word not in off)
    elif name == "Progress" and "disable" not in named and not ("console" in named and node.args):
        yield "Progress without a console and columns of its own"
    elif name in NEVER or ("markup" in named and "markup" not in off):
        yield f"{name} reads markup"
    elif name == "TextColumn" and "markup" not in off:
        yield "TextColumn without markup=False"
    elif name == "Panel" and not all(is_plain(named.get(word)) for word in ("title", "subtitle")):
        yield "the title of a Panel is markup; give it a Text"


def is_plain(title: ast.expr | None) -> bool:
    """Whether a title is none, a Text, or one of both."""
    if isinstance(title, ast.IfExp):
        return is_plain(title.body) and is_plain(title.orelse)
    return title is None or isinstance(title, ast.Constant) or ast.unparse(title).startswith("Text(")


def test_no_console_reads_markup() -> None:
    files = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    assert len(files) > 100
    assert [f"{path}: {one}" for path in files for one in complaints(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "line",
    [
        "Console(markup=False)",
        "Console(emoji=False)",
        "rich.print(path)",
        "from rich import print",
        "from rich.prompt import Prompt",
        "console.status(cause)",
        "TextColumn('{task.description}')",
        "Progress(console=console)",
        "Panel(text, subtitle=path)",
        "rich.console.Console(highlight=False, markup=True, emoji=False)",
        "Progress(*columns)",
        "Text.from_markup(f'[bold]{path}')",
        "console.print(path, markup=True)",
        "Panel(text, title=f'switch {switch}')",
    ],
)
def test_each_way_to_read_markup_is_seen(line: str) -> None:
    assert len(list(complaints(line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "Console(markup=False, emoji=False)",
        "Progress(*columns, console=console)",
        "TextColumn('{task.description}', markup=False)",
        "Panel(text, title=Text(f'{a}'))",
    ],
)
def test_what_prints_text_as_it_is_is_not_complained_of(line: str) -> None:
    assert list(complaints(line)) == []


ODD = "runs[bold]/my[/] :warning:"


def test_a_path_keeps_what_looks_like_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = Finding("a claim about run[x]", True, f"in {ODD}")
    monkeypatch.setitem(check.CHECKS, "order", lambda run_file, overrides: [finding])
    monkeypatch.setenv("COLUMNS", "200")
    assert check.run_checks(Path("run.toml"), [], ["order"]) == 0
    assert f"holds  order: a claim about run[x] (in {ODD})" in capsys.readouterr().out


def test_tables_bars_and_lines_keep_what_looks_like_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    restart = {"time": 1.0, "after": "failed", "detail": f"cause {ODD}", "step": 3, "reason": f"reason {ODD}"}
    state = {"state": "ended", "by": "ssh", "job": "", "hosts": [f"host {ODD}"], "ranks": 1, "restarts": [restart]}
    numbers = {"step": 3, "steps": 9, "loss": 2.0, "tokens_per_second": 1.0, "last_step_time": 1.0}
    end = {"cause": "ended", "detail": f"end {ODD}"}
    slow = {"rank": 1, "host": f"slow {ODD}", "excess": 0.5}
    hanging = {"rank": 1, "host": "h", "how": f"hangs {ODD}", "phase": "", "step": 4, "time": 1.0}
    state |= {"slow_rank": slow, "hanging_ranks": [hanging]}
    state["decision"] = {"action": "end", "reason": f"decision {ODD}"}
    print_status({**state, **numbers, "last_end": end})
    print_findings([f"node {ODD}"], [PreflightFinding(f"node {ODD}", "disk", False, f"text {ODD}")])
    with live() as progress:
        progress.add_task(f"task {ODD}", total=1)
        progress.console.print(f"line {ODD}")
    LiveLine(0, 1, enabled=True).say(f"said {ODD}")
    printed = capsys.readouterr().out
    for what in ("cause", "end", "host", "node", "text", "task", "line", "said", "slow", "hangs", "reason", "decision"):
        assert f"{what} {ODD}" in printed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("command", ["show data", "show batch", "check"])
def test_a_slow_command_says_at_once_that_it_begins_but_not_into_a_pipe(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At once: before the run file is read, which is missing here."""
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(UserError, match=r"none\.toml"):
            app([*command.split(), str(tmp_path / "none.toml")], standalone_mode=False)
        begins = stream.getvalue().startswith(f"bigmodel: {command}") and "loading" in stream.getvalue()
        assert begins == stream.isatty()


def helps(command: Any) -> Iterator[str]:
    """The help of a command, of its options and of the commands below it."""
    yield command.help or ""
    yield from (option.help or "" for option in command.params if hasattr(option, "help"))
    for below in getattr(command, "commands", {}).values():
        yield from helps(below)


def test_no_word_of_a_command_s_help_is_lost_as_markup() -> None:
    """typer reads help as rich's markup: a section's name needs a backslash before its bracket."""
    lost = [
        text for text in helps(typer.main.get_command(app)) if Text.from_markup(text).plain != text.replace("\\[", "[")
    ]
    assert lost == []
