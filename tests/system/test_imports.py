"""Imports point one way. The table below is the order of the levels; every import in every file is held to it."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# Import name -> folder. In the tree `bigmodel/kernels` and `bigmodel/launcher` are links to the folders beside it.
PACKAGES = {"bigmodel.kernels": "kernels", "bigmodel.launcher": "launcher", "bigmodel": "bigmodel"}
OURS = ("bigmodel", "kernels", "launcher", "tools", "tests", "benchmarks")

# What the modules of a room may import of the project. The longest name that fits a module counts; a name allows
# everything below it. Where a room has no line here, the line of the room around it holds.
ALLOWED = {
    "bigmodel.kernels": ("bigmodel.kernels",),
    "bigmodel.config": (
        "bigmodel.config",
        "bigmodel.sizes",
        "bigmodel.data.objectives.table",
        "bigmodel.data.objectives.noise_table",
        "bigmodel.training.optimizers.table",
        "bigmodel.planning.devices",
    ),
    "bigmodel.data.objectives.table": (),
    "bigmodel.data.objectives.noise_table": (),
    "bigmodel.training.optimizers.table": (),
    "bigmodel.sizes": (),
    "bigmodel.pictures": ("bigmodel.config.user_error",),
    "bigmodel.rank_log": (),
    "bigmodel.system_errors": (),
    "bigmodel.run_directory": ("bigmodel.config", "bigmodel.sizes", "bigmodel.system_errors"),
    "bigmodel.data": (
        "bigmodel.config",
        "bigmodel.pictures",
        "bigmodel.run_directory",
        "bigmodel.sizes",
        "bigmodel.data",
    ),
    "bigmodel.data.objectives": ("bigmodel.config", "bigmodel.data.randomness", "bigmodel.data.objectives"),
    "bigmodel.data.store": (
        "bigmodel.config",
        "bigmodel.run_directory",
        "bigmodel.sizes",
        "bigmodel.data.randomness",
        "bigmodel.data.objectives",
        "bigmodel.data.store",
    ),
    "bigmodel.data.plan": (
        "bigmodel.config",
        "bigmodel.data.randomness",
        "bigmodel.data.objectives",
        "bigmodel.data.plan",
    ),
    "bigmodel.data.prepare": (
        "bigmodel.config",
        "bigmodel.pictures",
        "bigmodel.run_directory",
        "bigmodel.sizes",
        "bigmodel.data.store",
        "bigmodel.data.prepare",
    ),
    "bigmodel.model": ("bigmodel.kernels", "bigmodel.config", "bigmodel.data.load.batch", "bigmodel.model"),
    "bigmodel.model.huggingface": (
        "bigmodel.config",
        "bigmodel.data.load.batch",
        "bigmodel.run_directory",
        "bigmodel.model",
    ),
    "bigmodel.distributed": (
        "bigmodel.config",
        "bigmodel.run_directory",
        "bigmodel.data.store",
        "bigmodel.distributed",
    ),
    "bigmodel.metrics": (
        "bigmodel.config",
        "bigmodel.run_directory",
        "bigmodel.sizes",
        "bigmodel.system_errors",
        "bigmodel.data",
        "bigmodel.metrics",
    ),
    "bigmodel.metrics.exporter": ("bigmodel.metrics",),
    "bigmodel.training.optimizers": (
        "bigmodel.config",
        "bigmodel.training.optimizers",
        "bigmodel.training.zero.layouts",
    ),
    "bigmodel.planning": (
        "bigmodel.config",
        "bigmodel.data.objectives",
        "bigmodel.data.plan",
        "bigmodel.data.store",
        "bigmodel.launcher.cluster",
        "bigmodel.metrics.flops",
        "bigmodel.pictures",
        "bigmodel.run_directory",
        "bigmodel.sizes",
        "bigmodel.training.optimizers.table",
        "bigmodel.planning",
    ),
    "bigmodel.planning.devices": (),
    "bigmodel.interpreter": (),
    "bigmodel.finished_run": ("bigmodel.config", "bigmodel.run_directory", "bigmodel.training.checkpoint.folder"),
    "bigmodel.launcher": (
        "bigmodel.launcher",
        "bigmodel.config",
        "bigmodel.finished_run",
        "bigmodel.interpreter",
        "bigmodel.rank_log",
        "bigmodel.run_directory",
        "bigmodel.sizes",
        "bigmodel.system_errors",
    ),
    "bigmodel": ("bigmodel",),
}
# What few may import: nothing imports the command line, and only the command line imports the launcher; a plan reads
# cluster files; a sweep waits for runs that go on.
IMPORTERS = {
    "bigmodel.__main__": (),
    "bigmodel.launcher": ("bigmodel.launcher", "bigmodel.__main__", "bigmodel.planning", "bigmodel.sweep"),
}
ONE_FILE = {
    "deepspeed": "bigmodel.training.zero.engine",
    "streaming": "bigmodel.data.store.shards",
    "prometheus_client": "bigmodel.metrics.exporter",
    "distributed": "bigmodel.data.prepare.work_items",
    "fsspec": "bigmodel.data.store.files",
    "gguf": "bigmodel.exchange.gguf_file",
}


def modules(root: Path) -> dict[str, Path]:
    """Module name -> file, for every Python file of the package."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):  # does not follow links
            parts = (package, *path.relative_to(root / folder).with_suffix("").parts)
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
            for guarded, importers in IMPORTERS.items():
                if under(target, (guarded,)) and not under(name, importers):
                    found.append(f"{name} imports {target}: only {', '.join(importers) or 'nothing'} may")
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


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_names(root: Path) -> set[str]:
    """Names with an underscore in front that our code, tools included, gives to something."""
    found = set()
    for folder in (*PACKAGES, "tools"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    found.add(node.name)
                elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return set(filter(private, found))


def private_use(node: ast.AST) -> Iterator[str]:
    """The private names that a node takes from somewhere else: imported, of an object, or to put another in place."""
    if isinstance(node, ast.ImportFrom):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
        yield node.attr
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "delattr")):
        texts = [one.value for one in node.args[:2] if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        yield from (text.rpartition(".")[2] for text in texts)


def forbidden_in_tests(root: Path) -> list[str]:
    """Every use of a private name of ours in a test, and every import of tools outside a test, as a sentence."""
    ours, found = private_names(root), []
    for path in sorted((root / "tests").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found += [f"{name} uses {used}: it is private" for used in private_use(node) if used in ours]
        if not path.name.startswith("test_"):
            tools = [one for one in imports(name, path) if under(one, ("tools", "benchmarks"))]
            found += [f"{name} imports {one}: tools import what supports tests, never the reverse" for one in tools]
    return found


def test_tests_use_no_private_name_and_what_supports_them_no_tools() -> None:
    assert forbidden_in_tests(REPOSITORY) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("test_saving.py", "from bigmodel.config.settings import _read", "test_saving.py uses _read"),
        ("test_saving.py", "def f():\n    from bigmodel.config.settings import _read", "test_saving.py uses _read"),
        ("test_saving.py", "config._read('x')", "uses _read"),
        ("test_saving.py", "saver_of(path)._last = 3", "uses _last"),
        ("test_saving.py", "monkeypatch.setattr(config, '_read', None)", "uses _read"),
        ("test_saving.py", "monkeypatch.setattr('bigmodel.config.settings._read', None)", "uses _read"),
        ("launched.py", "config._read('x')", "launched.py uses _read"),
        ("launched.py", "def f():\n    import tools.torture", "launched.py imports tools.torture"),
        ("test_torture.py", "from tools.torture import POINTS", None),
        ("test_saving.py", "os._exit(3); torch._dynamo.reset(); pair._replace(a=1)", None),
        ("test_saving.py", "class Store:\n    def f(self):\n        self._last = 1", None),
        ("test_saving.py", "assert samples['seconds_read'] == text['_read']", None),
    ],
)
def test_each_rule_of_tests_is_seen_to_bite(tmp_path: Path, file: str, line: str, complaint: str | None) -> None:
    for name in ("bigmodel", "tests"):
        (tmp_path / name).mkdir()
    (tmp_path / "bigmodel/config").mkdir(parents=True, exist_ok=True)
    (tmp_path / "bigmodel/config/settings.py").write_text(
        "def _read(): ...\nclass Saver:\n    def f(self): self._last = 1\n"
    )
    (tmp_path / "tests" / file).write_text(line + "\n")
    found = forbidden_in_tests(tmp_path)
    assert len(found) == (complaint is not None), found
    assert complaint is None or complaint in found[0]


def test_every_import_points_down_the_table() -> None:
    assert forbidden(REPOSITORY) == []


def test_no_modules_import_each_other_in_a_ring() -> None:
    assert cycle(REPOSITORY) == []


def test_the_table_speaks_of_what_exists() -> None:
    """A renamed module must not leave a rule that holds of nothing."""
    known = modules(REPOSITORY)
    named = {name for names in ALLOWED.values() for name in names} | set(ALLOWED) | set(IMPORTERS)
    assert sorted((named | set(ONE_FILE.values())) - set(known) - set(PACKAGES)) == []
    for library, home in ONE_FILE.items():
        assert any(under(name, (library,)) for name in imports(home, known[home])), (
            f"{home} no longer imports {library}"
        )


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("bigmodel/config/settings.py", "import bigmodel.run_directory", "settings imports bigmodel.run_directory"),
        ("bigmodel/config/settings.py", "from bigmodel import run_directory", "imports bigmodel.run_directory"),
        ("bigmodel/data/plan/packing.py", "def f():\n    from ...model import head", "imports bigmodel.model.head"),
        ("bigmodel/data/plan/packing.py", "from . import order", None),
        ("bigmodel/data/plan/order.py", "import bigmodel.data.load.batch", "imports bigmodel.data.load.batch"),
        ("bigmodel/model/head.py", "from bigmodel.data.load.batch import Batch", None),
        ("bigmodel/model/head.py", "from bigmodel.data.plan.order import Order", "imports bigmodel.data.plan.order"),
        ("bigmodel/training/loop.py", "import bigmodel.kernels.attention, bigmodel.model.head", None),
        (
            "bigmodel/training/loop.py",
            "from bigmodel.launcher import local",
            "only bigmodel.launcher, bigmodel.__main__, bigmodel.planning, bigmodel.sweep",
        ),
        ("bigmodel/training/loop.py", "from launcher import local", "imports launcher"),
        ("bigmodel/training/loop.py", "import tools.compare", "imports tools"),
        ("bigmodel/training/loop.py", "import deepspeed.comm", "only bigmodel.training.zero.engine may"),
        ("bigmodel/training/zero/engine.py", "import deepspeed", None),
        ("bigmodel/data/plan/order.py", "def f():\n    import streaming", "only bigmodel.data.store.shards may"),
        ("bigmodel/training/loop.py", "__import__('prometheus_client')", "only bigmodel.metrics.exporter may"),
        ("kernels/attention.py", "from bigmodel.config.settings import UserError", "imports bigmodel.config.settings"),
        ("launcher/local.py", "from bigmodel.metrics.recorder import Metrics", "imports bigmodel.metrics.recorder"),
        ("launcher/local.py", "from bigmodel.config.settings import UserError", None),
        ("bigmodel/checks/guarantees.py", "from bigmodel.__main__ import app", "only nothing may"),
    ],
)
def test_each_rule_is_seen_to_bite(tmp_path: Path, module: str, line: str, complaint: str | None) -> None:
    names = "run_directory data/plan/order data/load/batch model/head config/settings metrics/recorder __main__"
    files = [f"bigmodel/{name}.py" for name in names.split()]
    for name in (*files, "launcher/local.py", "kernels/attention.py"):
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


def test_the_view_of_a_run_directory_imports_no_settings() -> None:
    """Their models take as long to make as all else before the first frame."""
    code = (
        "import sys, bigmodel.__main__, bigmodel.inspect.watch, bigmodel.launcher.record, bigmodel.launcher.watch\n"
        "print(sorted(name for name in sys.modules if 'settings' in name or name == 'pydantic'))"
    )
    assert _printed(code) == "[]"


def test_what_a_login_node_runs_imports_neither_torch_nor_its_company() -> None:
    code = (
        "import sys, bigmodel.launcher.__main__, bigmodel.config.settings, bigmodel.run_directory\n"
        "import bigmodel.metrics.recorder, bigmodel.inspect.report, bigmodel.metrics.exporter\n"
        "import bigmodel.metrics.flops, bigmodel.planning.context, bigmodel.planning.calibration\n"
        "import bigmodel.inspect.page.serve\n"
        "print(sorted({'torch', 'deepspeed', 'streaming', 'triton', 'transformers'} & set(sys.modules)))"
    )
    assert _printed(code) == "[]"


def _printed(code: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    return answer.stdout.strip()
