"""Imports point one way. The table below is the order of the levels; every import in every file is held to it."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("kernels", "bigmodel", "launcher")
OURS = (*PACKAGES, "tools", "tests", "benchmarks")

# What the modules under a name may import of the project. The longest name that fits a module counts; a name
# allows everything under it. What stands above the levels (`bigmodel`) may import all of bigmodel and the kernels.
ALLOWED = {
    "kernels": ("kernels",),
    "bigmodel.sections": (),
    "bigmodel.data_settings": ("bigmodel.sections",),
    "bigmodel.config": ("bigmodel.data_settings", "bigmodel.sections"),
    "bigmodel.rundir": ("bigmodel.config",),
    "bigmodel.metric_table": (),
    "bigmodel.rank_record": (),
    "bigmodel.ledger": (),
    "bigmodel.health": (),
    "bigmodel.profiling": (),
    "bigmodel.exporter": (
        "bigmodel.health",
        "bigmodel.metric_table",
        "bigmodel.profiling",
        "bigmodel.rank_record",
    ),
    "bigmodel.page": ("bigmodel.config", "bigmodel.rank_record", "bigmodel.rundir"),
    "bigmodel.metrics": (
        "bigmodel.config",
        "bigmodel.ledger",
        "bigmodel.metric_table",
        "bigmodel.page",
        "bigmodel.rank_record",
        "bigmodel.rundir",
        "bigmodel.writers",
    ),
    "bigmodel.writers": ("bigmodel.config",),
    "bigmodel.report": ("bigmodel.config", "bigmodel.rundir", "bigmodel.step_time"),
    "bigmodel.step_time": ("bigmodel.config", "bigmodel.ledger", "bigmodel.rundir"),
    "bigmodel.data": ("bigmodel.config", "bigmodel.rundir", "bigmodel.data"),
    "bigmodel.model": ("kernels", "bigmodel.config", "bigmodel.data.batch", "bigmodel.model"),
    "bigmodel": ("kernels", "bigmodel"),
    "launcher": ("launcher", "bigmodel.config", "bigmodel.rundir"),
}
NEVER_BELOW = ("bigmodel.__main__",)  # nothing imports the command line
ONE_FILE = {
    "deepspeed": "bigmodel.training.engine",
    "streaming": "bigmodel.data.shards",
    "prometheus_client": "bigmodel.exporter",
    "distributed": "bigmodel.data.units",
    "fsspec": "bigmodel.data.files",
}


def modules(root: Path) -> dict[str, Path]:
    """Module name -> file, for every Python file of the three packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[str]:
    """Every dotted name that a file imports, also inside functions; `from a import b` gives a.b."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func)
            if function in ("__import__", "import_module", "importlib.import_module"):
                yield str(node.args[0].value)


def under(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def module_of(name: str, known: dict[str, Path]) -> str:
    """The module that an imported name lives in: the longest part of it that is one."""
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def forbidden(root: Path) -> list[str]:
    """Every import that breaks a rule, as a sentence; empty when the table holds."""
    known = modules(root)
    found = []
    for name, path in known.items():
        level = max((prefix for prefix in ALLOWED if under(name, (prefix,))), key=len)
        for imported in imports(name, path):
            top = imported.partition(".")[0]
            target = module_of(imported, known)
            if top in OURS and target != "bigmodel" and not under(target, ALLOWED[level]):
                found.append(f"{name} imports {target}: {level} may import {', '.join(ALLOWED[level]) or 'nothing'}")
            if target in NEVER_BELOW:
                found.append(f"{name} imports {target}: nothing may")
            if top in ONE_FILE and name != ONE_FILE[top]:
                found.append(f"{name} imports {top}: only {ONE_FILE[top]} may")
    return found


def cycle(root: Path) -> list[str]:
    """Modules that import each other in a ring, or none."""
    known = modules(root)
    graph = {name: {module_of(i, known) for i in imports(name, path)} & set(known) for name, path in known.items()}
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    graph = {name: targets - packages - {name} for name, targets in graph.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_import_points_down_the_table() -> None:
    assert forbidden(REPOSITORY) == []


def test_no_modules_import_each_other_in_a_ring() -> None:
    assert cycle(REPOSITORY) == []


def test_the_table_speaks_of_what_exists() -> None:
    """A renamed module must not leave a rule that holds of nothing."""
    known = modules(REPOSITORY)
    named = {name for names in ALLOWED.values() for name in names} | set(ALLOWED) | set(NEVER_BELOW)
    assert sorted(named | set(ONE_FILE.values())) == sorted((named | set(ONE_FILE.values())) & set(known))
    for library, home in ONE_FILE.items():
        assert any(under(name, (library,)) for name in imports(home, known[home])), (
            f"{home} no longer imports {library}"
        )


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("bigmodel/config.py", "import bigmodel.rundir", "bigmodel.config imports bigmodel.rundir"),
        ("bigmodel/config.py", "from bigmodel import rundir", "bigmodel.config imports bigmodel.rundir"),
        (
            "bigmodel/data/packing.py",
            "def f():\n    from ..model import head",
            "bigmodel.data.packing imports bigmodel",
        ),
        ("bigmodel/data/packing.py", "from . import order", None),
        ("bigmodel/model/head.py", "from bigmodel.data.batch import Batch", None),
        ("bigmodel/model/head.py", "from bigmodel.data.order import Order", "imports bigmodel.data.order"),
        ("bigmodel/training/loop.py", "import kernels.attention, bigmodel.model.head", None),
        ("bigmodel/training/loop.py", "from launcher import local", "imports launcher"),
        ("bigmodel/training/loop.py", "import tools.compare", "imports tools"),
        ("bigmodel/training/loop.py", "import deepspeed.comm", "only bigmodel.training.engine may"),
        ("bigmodel/training/engine.py", "import deepspeed", None),
        ("bigmodel/data/order.py", "def f():\n    import streaming", "only bigmodel.data.shards may"),
        ("bigmodel/training/loop.py", "__import__('prometheus_client')", "only bigmodel.exporter may"),
        ("kernels/attention.py", "from bigmodel.config import UserError", "kernels.attention imports bigmodel.config"),
        ("launcher/local.py", "from bigmodel.metrics import Metrics", "launcher.local imports bigmodel.metrics"),
        ("launcher/local.py", "from bigmodel.config import UserError", None),
        ("bigmodel/check.py", "from bigmodel.__main__ import app", "nothing may"),
    ],
)
def test_each_rule_is_seen_to_bite(tmp_path: Path, module: str, line: str, complaint: str | None) -> None:
    others = ("bigmodel/rundir.py", "bigmodel/data/order.py", "bigmodel/data/batch.py", "bigmodel/model/head.py")
    for name in (*others, "bigmodel/config.py", "bigmodel/metrics.py", "bigmodel/__main__.py", "launcher/local.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / module).write_text(line + "\n")
    found = forbidden(tmp_path)
    assert len(found) == (complaint is not None)
    assert complaint is None or complaint in found[0]


def test_a_ring_is_seen(tmp_path: Path) -> None:
    (tmp_path / "bigmodel").mkdir()
    (tmp_path / "bigmodel" / "plan.py").write_text("import bigmodel.show\n")
    (tmp_path / "bigmodel" / "show.py").write_text("def f():\n    from bigmodel.plan import plan\n")
    assert set(cycle(tmp_path)) == {"bigmodel.plan", "bigmodel.show"}


def test_what_a_login_node_runs_imports_neither_torch_nor_its_company() -> None:
    code = (
        "import sys, launcher.__main__, bigmodel.config, bigmodel.rundir, bigmodel.metrics, bigmodel.report\n"
        "import bigmodel.exporter\n"
        "print(sorted({'torch', 'deepspeed', 'streaming', 'triton', 'transformers'} & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    assert answer.stdout.strip() == "[]"
