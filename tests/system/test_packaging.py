"""What pip installs: a wheel that trains in an empty folder, the console command, PyPI's `kernels` beside ours."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from bigmodel import __main__ as command_line
from bigmodel import __version__, interpreter
from bigmodel.run_directory import read_json_lines
from tests.support.tiny_corpus import write_sources

REPOSITORY = Path(__file__).parents[2]
CONSTRAINTS = REPOSITORY / "configs" / "constraints.txt"
RUN = """
[run]
directory = "run"

[data]
directory = "data"
max_document_length = 48
sequence_length = 96
lanes = 2
packing_buffer = 20

[prepare]
vocabulary = 300
validation_share = 0.2
shard_tokens = 1500
workers = 1
sources = [{{ name = "news", files = ["{news}"], column = "body" }}]

[model]
num_layers = 1
hidden_size = 32
num_heads = 2
num_kv_heads = 2
intermediate_size = 48

[schedule]
warmup_steps = 1

[training]
global_batch_size = 4

[evaluation]
at_end = false
"""


def call(*command: str | Path, cwd: Path, code: int = 0, seconds: float = 250) -> str:
    """What a command prints, with nothing of this checkout in its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def pinned(name: str) -> str:
    """A requirement with the version of the constraints file."""
    return next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith(f"{name}=="))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git knows, in a folder with a space in its name: a build leaves files behind."""
    copy = tmp_path_factory.mktemp("packaging") / "big model"
    for name in call("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=REPOSITORY).split("\0"):
        if name and os.path.lexists(REPOSITORY / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    """Built as `python -m build` does: the wheel from the sdist, here with the setuptools that is installed."""
    out = checkout.parent / "dist"
    out.mkdir()
    build("sdist", checkout, out)
    [sdist] = out.glob("*.tar.gz")
    call(*pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, sdist), cwd=out)
    [built] = out.glob("*.whl")
    return built


def build(kind: str, checkout: Path, out: Path) -> None:
    """What pip and `python -m build` have setuptools do."""
    call(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})", cwd=checkout)


def pip(*words: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]


def environment_of(folder: Path, *requirements: str | Path) -> Path:
    """The programs of a new environment: the requirements, and below them all that this environment has.

    The path is added last, so that pip does not find there what it shall install; its .pth files do not count, so our
    own editable install is not seen.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    call(*pip("--python", python, "install", "--no-deps", *requirements), cwd=folder)
    [site_packages] = (folder / "lib").glob("python*/site-packages")
    (site_packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    return environment_of(wheel.parent / "installed", wheel, pinned("kernels"))


@pytest.fixture(scope="module")
def editable(checkout: Path) -> Path:
    out = checkout.parent / "editable-wheel"
    out.mkdir()
    build("editable", checkout, out)
    return environment_of(checkout.parent / "editable", *out.glob("*.whl"), pinned("kernels"))


def test_the_wheel_holds_the_package_and_nothing_else(checkout: Path, wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = [
        Path(
            "bigmodel" if folder == "bigmodel" else "",
            path.relative_to(checkout / folder if folder == "bigmodel" else checkout),
        )
        for folder in ("bigmodel", "kernels", "launcher")
        for path in (checkout / folder).rglob("*")
        if path.suffix in (".py", ".toml", ".txt") or path.parent.name == "static"
    ]
    expected = {str(path if path.parts[0] == "bigmodel" else Path("bigmodel", path)) for path in sources}
    assert files == expected
    assert {"bigmodel/kernels/attention.py", "bigmodel/launcher/fabrics/known_variables.txt"} <= files


def test_the_metadata_name_the_license_the_command_and_no_author(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    folder = f"bigmodel-{__version__}.dist-info"
    metadata = archive.read(f"{folder}/METADATA").decode().partition("\n\n")[0]
    assert {"License-Expression: Apache-2.0", "License-File: LICENSE"} <= set(metadata.splitlines())
    assert "Author" not in metadata
    assert archive.read(f"{folder}/licenses/LICENSE") == (REPOSITORY / "LICENSE").read_bytes()
    assert "bigmodel = bigmodel.__main__:main" in archive.read(f"{folder}/entry_points.txt").decode()
    [sdist] = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"LICENSE", "configs/tiny.toml", "configs/deepspeed/zero1.json", "bigmodel/kernels/attention.py"} <= names
    assert {"configs/models/8b.toml", "configs/clusters/h100-64.toml"} <= names
    assert not [name for name in names if name.startswith("tests")]


def prepare_and_train(programs: Path, folder: Path) -> None:
    """As a user with nothing but the package and a run file does."""
    write_sources(folder / "text")
    (folder / "my.toml").write_text(RUN.format(news="text/news.jsonl"))
    call(programs / "bigmodel", "prepare", "my.toml", cwd=folder)
    words = ["launch", "local", "my.toml", "--ranks", "2", "--set", "training.steps=4"]
    call(programs / "bigmodel", *words, cwd=folder)
    metrics = [line for line in read_json_lines(folder / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert (folder / "run" / "checkpoints" / "step-00000004").is_dir()
    assert len(list((folder / "run" / "logs").glob("*-rank-*.log"))) == 2
    assert "finished" in call(programs / "bigmodel", "launch", "status", "run", cwd=folder)


def test_an_installed_wheel_prepares_and_trains_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = call(installed / "python", "-c", "import bigmodel; print(bigmodel.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    prepare_and_train(installed, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_wheel_trains_in_an_environment_that_was_empty(wheel: Path, tmp_path: Path) -> None:
    """Everything from the index: a gigabyte and minutes."""
    venv.create(tmp_path / "empty", symlinks=True)
    install = pip("--python", tmp_path / "empty/bin/python", "install", "--constraint", CONSTRAINTS)
    call(*install, pinned("torch"), cwd=tmp_path, seconds=3000)
    call(*install, wheel, pinned("kernels"), cwd=tmp_path, seconds=3000)
    (tmp_path / "folder").mkdir()
    prepare_and_train(tmp_path / "empty" / "bin", tmp_path / "folder")
    check_kernels(tmp_path / "empty" / "bin", tmp_path / "folder")


KERNELS = """
import bigmodel.model.transformer, bigmodel.kernels.attention, kernels, transformers.utils
from transformers.integrations import hub_kernels
assert callable(kernels.get_kernel) and transformers.utils.is_kernels_available()
print(kernels.__file__, hub_kernels.get_kernel.__module__, bigmodel.kernels.attention.__file__, sep="\\n")
"""


def check_kernels(programs: Path, cwd: Path) -> list[str]:
    """PyPI's package is what `import kernels` and transformers get, ours is ours. Gives where they come from."""
    files = call(programs / "python", "-W", "ignore", "-c", KERNELS, cwd=cwd).splitlines()[-3:]
    assert Path(files[0]).is_relative_to(programs.parent)
    assert files[1].startswith("kernels")
    return files


def test_pypi_s_kernels_and_ours_live_in_one_environment(
    installed: Path, editable: Path, checkout: Path, tmp_path: Path
) -> None:
    """From a wheel, and from a checkout: also with the checkout, which has a folder `kernels`, as current folder."""
    assert Path(check_kernels(installed, tmp_path)[2]).is_relative_to(installed.parent)
    for folder in (tmp_path, checkout):
        assert Path(check_kernels(editable, folder)[2]).is_relative_to(checkout)


def test_the_launcher_s_own_folder_and_command_go_on_in_a_checkout(editable: Path, checkout: Path) -> None:
    for words in (["-m", "launcher"], ["-m", "bigmodel", "launch"]):
        shown = call(
            editable / "python", *words, "local", "configs/tiny.toml", "--ranks", "1", "--dry-run", cwd=checkout
        )
        assert "-m bigmodel train configs/tiny.toml" in shown


# ---- The command line


def test_help_and_completion_import_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']\nfrom bigmodel.__main__ import main\n"
        "try: main()\nexcept SystemExit: print('heavy:', {'torch', 'deepspeed', 'pydantic', 'numpy'} & {*sys.modules})"
    )
    assert "heavy: set()" in call(sys.executable, "-c", code, cwd=REPOSITORY)


def test_usage_errors_name_the_program(installed: Path, tmp_path: Path) -> None:
    assert "Usage: bigmodel launch local" in call(installed / "bigmodel", "launch", "local", cwd=tmp_path, code=2)
    assert "Usage: bigmodel train" in call(installed / "bigmodel", "train", cwd=tmp_path, code=2)
    said = call(installed / "bigmodel", "launch", "local", "none.toml", cwd=tmp_path, code=2)
    assert said.startswith("bigmodel: none.toml: no such run file")


COMPLETE = """
eval "$(_BIGMODEL_COMPLETE=source_bash bigmodel)"
for words in "launch lo" "pre" "show me" "train m"; do
    COMP_WORDS=(bigmodel $words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    COMPREPLY=(); _bigmodel_completion bigmodel
    echo "$words: ${COMPREPLY[*]}"
done
complete -p bigmodel
"""


def test_bash_completes_commands_and_leaves_files_to_the_shell(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "my.toml").touch()
    shown = call("bash", "-c", f"PATH={installed}:$PATH\n{COMPLETE}", cwd=tmp_path).splitlines()
    assert shown == [
        "launch lo: local logs",
        "pre: prepare",
        "show me: memory metrics",
        "train m: ",
        "complete -o default -F _bigmodel_completion bigmodel",
    ]


@pytest.mark.parametrize("module", ["bigmodel", "launcher"])
def test_an_interpreter_without_the_dependencies_is_told_in_one_line(checkout: Path, module: str) -> None:
    command = [sys.executable, "-S", "-m", module, "train", "x.toml"]  # -S: without site-packages
    [line] = call(*command, cwd=checkout, code=2).splitlines()
    assert line.endswith(f"has no module typer; run `make setup` in {checkout}, then `source .venv/bin/activate`")
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "installed").touch()
    [line] = call(*command, cwd=checkout, code=2).splitlines()
    shutil.rmtree(checkout / ".venv")
    assert line.endswith("has no module typer; run `source .venv/bin/activate` first")


def test_a_missing_dependency_is_told_and_a_missing_module_of_ours_is_a_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def importing(name: str) -> None:
        def app() -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(command_line, "app", app)
        command_line.main()

    with pytest.raises(SystemExit) as end:
        importing("torch")
    assert end.value.code == 2
    assert "has no module torch; run `" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):
        importing("bigmodel.nothing")


def test_an_old_python_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 6, 8))
    with pytest.raises(SystemExit) as end:
        interpreter.require_interpreter()
    assert end.value.code == 2
    assert re.fullmatch(r"bigmodel: \S+ is Python 3\.6; 3\.11 or 3\.12 is needed; run `.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "name", ["bigmodel/__init__", "bigmodel/__main__", "bigmodel/interpreter", "launcher/__main__"]
)
def test_an_old_python_can_read_what_comes_before_that(name: str) -> None:
    ast.parse((REPOSITORY / f"{name}.py").read_text(), feature_version=(3, 6))


def test_the_modules_of_all_dependencies_are_known() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    required = {re.match(r"[\w-]+", line)[0].lower() for line in project["dependencies"]}  # type: ignore[index]
    distributions = {
        module: {name.lower().replace("_", "-") for name in names}
        for module, names in packages_distributions().items()
        if interpreter.is_dependency(module)
    }
    assert {name for names in distributions.values() for name in names} & required == required
    assert all(names & required for names in distributions.values())
