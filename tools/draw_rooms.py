"""Draws the rooms of ARCHITECTURE.md from the imports of the source: `python -m tools.draw_rooms [PNG]`.

A room is a folder of Python files; each loose file of `bigmodel/` is a room. A room stands above all rooms that it
imports. An arrow points from a room to a room that it imports; arrows that follow from others are left out. If rooms
import each other in a ring (files never do), the arrow with the fewest imports is dashed and points up. `--text`
prints each room with its imports.
"""

import argparse
import ast
import graphlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PNG = REPOSITORY / "docs" / "rooms.png"
TOPS = ("bigmodel", "kernels", "launcher")
COLORS = {"data": "#cfe3f5", "training": "#d9ead3", "other": "#eeeeee"}  # by subject of the room
Rooms = dict[str, set[str]]


def files() -> dict[str, Path]:
    """Dotted name -> file, for all modules imported as bigmodel."""
    found = {}
    for top in TOPS:
        for path in sorted((REPOSITORY / top).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            if path.name != "__init__.py" and parts[:2] not in (("bigmodel", "kernels"), ("bigmodel", "launcher")):
                found[".".join(parts if top == "bigmodel" else ("bigmodel", *parts))] = path
    return found


def room_of(name: str) -> str:
    """bigmodel.data.plan.order -> data/plan; bigmodel.run_directory -> run_directory."""
    parts = name.split(".")[1:]
    return "/".join(parts[:-1] or parts).replace("__main__", "command line")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (name for alias in node.names for name in (f"{node.module}.{alias.name}", str(node.module)))


def rooms() -> tuple[Rooms, Counter[tuple[str, str]], Counter[str]]:
    """Room -> imported rooms; (room, imported room) -> number of imports; room -> number of files."""
    known = files()
    sizes = Counter(map(room_of, known))
    counts = Counter(
        (room_of(name), room_of(other)) for name, path in known.items() for other in imported(path) if other in known
    )
    found: Rooms = {room: {other for one, other in counts if one == room and other != room} for room in sizes}
    return found, counts, sizes


def without_rings(found: Rooms, counts: Counter[tuple[str, str]]) -> tuple[Rooms, list[tuple[str, str]]]:
    """The rooms without the arrow with the fewest imports of each ring, and these arrows."""
    found = {room: set(others) for room, others in found.items()}
    left_out: list[tuple[str, str]] = []
    while True:
        try:
            graphlib.TopologicalSorter(found).prepare()
            return found, left_out
        except graphlib.CycleError as error:
            ring = error.args[1][::-1]  # each imports the next one
            one, other = min(itertools.pairwise(ring), key=lambda arrow: (counts[arrow], len(found[arrow[0]]), arrow))
            found[one].discard(other)
            left_out.append((one, other))


def floors(found: Rooms) -> dict[str, int]:
    """0 for a room without imports, else one above the highest imported room. There must be no ring."""
    height: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(found).static_order():
        height[room] = 1 + max((height[other] for other in found[room]), default=-1)
    return height


def needed_arrows(found: Rooms) -> list[tuple[str, str]]:
    """The arrows that do not follow from others."""
    reach: Rooms = {}
    for room in graphlib.TopologicalSorter(found).static_order():
        reach[room] = found[room].union(*(reach[other] for other in found[room]))
    return [
        (room, other)
        for room, others in found.items()
        for other in others
        if not any(other in reach[between] for between in others - {other})
    ]


def places(height: Mapping[str, int], arrows: list[tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """x and y of each room: on its floor, near the rooms that its arrows touch."""
    rows = defaultdict(list)
    for room in sorted(height):
        rows[height[room]].append(room)
    x = {room: float(number) for row in rows.values() for number, room in enumerate(row)}
    near = defaultdict(list)
    for one, other in arrows:
        near[one].append(other)
        near[other].append(one)
    for _ in range(50):
        for row in rows.values():
            row.sort(key=lambda room: sum(x[other] for other in near[room]) / max(len(near[room]), 1))
            for number, room in enumerate(row):
                x[room] = (number - (len(row) - 1) / 2) * (1 if len(row) > 3 else 1.3)
    return {room: (x[room], float(height[room])) for room in height}


def draw(png: Path) -> None:
    from matplotlib.figure import Figure

    all_rooms, counts, sizes = rooms()
    found, upward = without_rings(all_rooms, counts)
    height, arrows = floors(found), needed_arrows(found)
    place = places(height, arrows)
    figure = Figure(figsize=(11, 1.15 * (max(height.values()) + 1)), layout="constrained")
    axes = figure.subplots()
    patches = {}
    for room, (x, y) in place.items():
        color = COLORS.get(room.partition("/")[0], COLORS["other"])
        box = {"boxstyle": "round,pad=0.45", "facecolor": color, "edgecolor": "#444444"}
        text = f"{room}\n{sizes[room]} file{'s' * (sizes[room] > 1)}"
        drawn = axes.text(x, y, text, ha="center", va="center", fontsize=10, bbox=box, zorder=2)
        patches[room] = drawn.get_bbox_patch()
    for one, other in [*arrows, *upward]:
        style = {"arrowstyle": "-|>,head_width=0.3,head_length=0.6", "color": "#666666", "linewidth": 1}
        style |= {"patchA": patches[one], "patchB": patches[other], "shrinkA": 0, "shrinkB": 2}
        style["connectionstyle"] = (
            f"arc3,rad={0.12 if (one, other) in upward or place[one][1] - place[other][1] > 1 else 0}"
        )
        style["linestyle"] = "dashed" if (one, other) in upward else "solid"
        axes.annotate("", xy=place[other], xytext=place[one], arrowprops=style, zorder=1)
    wide = max(abs(x) for x, _ in place.values()) + 0.5
    axes.set_xlim(-wide, wide)
    axes.set_ylim(-0.5, max(height.values()) + 0.5)
    axes.axis("off")
    figure.savefig(png, dpi=110, metadata={"Software": None})
    print(png)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("png", nargs="?", type=Path, default=PNG)
    parser.add_argument("--text", action="store_true", help="print the rooms instead")
    arguments = parser.parse_args()
    if arguments.text:
        for room, others in sorted(rooms()[0].items()):
            print(f"{room}: {', '.join(sorted(others))}")
    else:
        draw(arguments.png)
