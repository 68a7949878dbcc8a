"""Pictures of a topology, in the terminal and as PNG: switches contain nodes, nodes contain ranks."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from bigmodel.launcher.topology import Topology

COLUMNS = 8  # ranks in a row of a node


def print_topology(topology: Topology) -> None:
    """Print a panel per switch with a line per node; nodes without a known switch share one panel."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(_headline(topology))
    width = max(len(host) for host in topology.hosts)
    for switch, nodes in _by_switch(topology).items():
        text = Text()
        for node in nodes:
            text.append(f"{topology.hosts[node]:<{width}} ", style="bold")
            text.append(f"{shorten(topology.ranks_of(node))}\n")
        text.right_crop(1)
        console.print(Panel(text, title=Text(f"switch {switch}") if switch else None, title_align="left", expand=False))


def draw_topology(topology: Topology, file: Path) -> None:
    """Draw a PNG: a box per node, a square per rank, a colour per switch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    groups = _by_switch(topology)
    order = [(switch, node) for switch, nodes in groups.items() for node in nodes]
    across = min(4, len(order))
    most = max(len(topology.ranks_of(node)) for node in range(len(topology.hosts)))
    columns, rows = min(COLUMNS, most), -(-most // COLUMNS)
    down = -(-len(order) // across)
    figure, axes = pyplot.subplots(figsize=(across * (columns * 0.45 + 0.5), down * (rows * 0.45 + 0.7) + 0.6))
    colours = pyplot.get_cmap("tab10")
    for place, (switch, node) in enumerate(order):
        left, top = place % across * (columns + 1), -(place // across) * (rows + 1.6)
        colour = colours(list(groups).index(switch) % 10)
        axes.add_patch(Rectangle((left - 0.2, top - rows - 0.1), columns + 0.4, rows + 0.9, fill=False, ec=colour))
        title = f"{topology.hosts[node]} ({switch})" if switch else topology.hosts[node]
        axes.text(left, top + 0.35, title, fontsize=8, va="center", parse_math=False)
        for index, rank in enumerate(topology.ranks_of(node)):
            x, y = left + index % COLUMNS, top - 1 - index // COLUMNS
            axes.add_patch(Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, color=colour, alpha=0.25))
            axes.text(x + 0.5, y + 0.5, str(rank), fontsize=7, ha="center", va="center")
    axes.set_title(_headline(topology), fontsize=9, parse_math=False)
    axes.set_xlim(-0.6, across * (columns + 1))
    axes.set_ylim(-down * (rows + 1.6) + 1, 1.2)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def shorten(ranks: Sequence[int]) -> str:
    """Ranks as ranges: 0-7, or 0,3-6."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ",".join("-".join(map(str, run)) for run in runs)


def _headline(topology: Topology) -> str:
    """One line on the whole topology. Port 0: the run has not started yet."""
    port = f":{topology.main_port}" if topology.main_port else ""
    nodes = "1 node" if len(topology.hosts) == 1 else f"{len(topology.hosts)} nodes"
    return f"{topology.world_size} ranks on {nodes}; rank 0 at {topology.main_address}{port}"


def _by_switch(topology: Topology) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for node in range(len(topology.hosts)):
        groups.setdefault(topology.switches[node] if topology.switches else "", []).append(node)
    return groups
