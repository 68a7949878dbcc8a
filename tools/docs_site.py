"""Hook of mkdocs: adds documents and pictures from outside `docs/`.

Adds the files of `ELSEWHERE` to those of `docs/` and rewrites links between documents for the site. A link to a file
without a page, such as a run file, becomes its text, because the site does not contain the source.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "ARCHITECTURE.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/support.md": "support.md",
    "configs/deepspeed/README.md": "deepspeed-files.md",
    "configs/prometheus/METRICS.md": "METRICS.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs with the files of `docs/`."""
    pictures = {
        path.relative_to(REPOSITORY).as_posix(): f"pictures/{path.name}" for path in REPOSITORY.glob("benchmarks/*.png")
    }
    for name, place in (ELSEWHERE | pictures).items():
        files.append(File.generated(config, place, abs_src_path=str(REPOSITORY / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Called by mkdocs for each page: rewrites its links from paths in the tree to paths on the site."""
    return rewritten(markdown, page.file.src_uri, {file.src_uri for file in files})


def rewritten(markdown: str, place: str, known: set[str]) -> str:
    homes = {place: name for name, place in ELSEWHERE.items()}
    folder = os.path.dirname(homes.get(place, f"docs/{place}"))

    def link(found: re.Match[str]) -> str:
        mark, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        if not target or "://" in target:
            return found[0]
        name = os.path.normpath(os.path.join(folder, target))
        there = ELSEWHERE.get(name, f"pictures/{os.path.basename(name)}" if mark else name.removeprefix("docs/"))
        if name.startswith("docs/"):
            there = name.removeprefix("docs/")
        return f"{mark}[{text}]({there}{anchor})" if there in known else text

    return LINK.sub(link, markdown)
