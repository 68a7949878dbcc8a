"""Tree: the local files that match a pattern, among symbolic links that may form loops.

In: a literal beginning and a pattern of Python's glob. Out: names of files and folders.

Guarantees: below `**` each real folder is entered once and each real file is named once: by a name that is no link,
else by the one in the fewest folders, of these the first. So names and links alone decide. A pattern that ends with
`**` or `**/*` names no folders. Hidden folders and files match only patterns that begin with a dot, as in glob.
"""

import glob
import heapq
import os
from collections.abc import Callable, Iterator

DEEPER = "**"
SAME = "read under another name"


def matching(start: str, rest: str, say: Callable[[str], None]) -> list[str]:
    """Names that match `start`, taken literally, and the pattern `rest`. `say` gets a line about links that were not
    followed and folders that cannot be listed."""
    passed: dict[str, str] = {}  # name -> reason
    names = _expand(glob.escape(start), rest, passed)
    if DEEPER in rest.split("/"):
        names = _once([name for name in names if not (is_whole(rest) and os.path.isdir(name))], passed)
    for reason in sorted(set(passed.values())):
        mine = sorted(name for name, why in passed.items() if why == reason)
        more = f" and {len(mine) - 1:,} more" if mine[1:] else ""
        say(f"{start}{rest}: passed over {mine[0].rstrip('/')}{more}: {reason}")
    return names


def is_whole(rest: str) -> bool:
    """Whether a pattern matches all that is inside a folder that it matches: then the folder itself adds nothing."""
    parts = rest.split("/")
    return parts[-1] == DEEPER or parts[-2:] == [DEEPER, "*"]


def _expand(before: str, rest: str, passed: dict[str, str]) -> list[str]:
    """Matches of the pattern `before` + `rest`; `before` has no `**`."""
    parts = rest.split("/")
    if DEEPER not in parts:
        return glob.glob(before + rest)
    number = parts.index(DEEPER)
    pattern = before + "".join(f"{part}/" for part in parts[:number])
    after = "/".join(parts[number + 1 :]) or "*"
    found: dict[str, None] = {}
    for folder in glob.glob(pattern) if pattern else [""]:
        for inside in _folders(folder, passed):
            found |= dict.fromkeys(_expand(glob.escape(inside), after, passed))
    return list(found)


def _folders(start: str, passed: dict[str, str]) -> Iterator[str]:
    """`start` and the folders below it, each real one once, with a slash at the end; links after all others."""
    waiting, links, seen = [start], list[tuple[int, str]](), set[str]()
    while waiting or links:
        folder = waiting.pop() if waiting else heapq.heappop(links)[1]
        real = os.path.realpath(folder or ".")
        if real in seen:
            passed[folder] = SAME
            continue
        seen.add(real)
        yield folder
        try:
            names = sorted(os.listdir(folder or "."))
        except OSError as error:
            passed[folder] = f"cannot be listed: {error.strerror}"
            continue
        for path in (folder + name for name in names if not name.startswith(".")):
            if os.path.islink(path) and os.path.isdir(path):
                heapq.heappush(links, _depth(f"{path}/"))
            elif os.path.isdir(path):
                waiting.append(f"{path}/")


def _depth(name: str) -> tuple[int, str]:
    return name.count("/"), name


def _once(names: list[str], passed: dict[str, str]) -> list[str]:
    """Of names of one real file, the preferred one."""
    chosen: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (os.path.islink(name), *_depth(name))):
        if chosen.setdefault(os.path.realpath(name), name) != name:
            passed[name] = SAME
    return list(chosen.values())
