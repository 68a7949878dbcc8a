"""Writes the example output of docs/plan.md: `python -m tools.write_plan_examples`.

In: the commands between the markers of the page,

    <!-- output of: bigmodel plan configs/models/8b.toml --ranks 64 -->  ...  <!-- end -->

Out: the same page with what each of them prints today. A test compares.
"""

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

from bigmodel.__main__ import app

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "plan.md"
EXAMPLE = re.compile(r"(<!-- output of: bigmodel (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """The page with the output of its commands, run in the repository."""
    return EXAMPLE.sub(lambda found: f"{found[1]}```text\n{output(shlex.split(found[2]))}```\n{found[3]}", text)


def output(arguments: list[str]) -> str:
    """What `bigmodel` prints into a pipe, without blanks at the ends of lines."""
    printed, here = io.StringIO(), Path.cwd()
    os.chdir(REPOSITORY)
    try:
        with contextlib.redirect_stdout(printed):
            app(arguments, standalone_mode=False)
    finally:
        os.chdir(here)
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines()) + "\n"


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
