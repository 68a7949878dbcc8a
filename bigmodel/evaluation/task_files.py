"""Finding and loading lm_eval's tasks: by name, from a folder of task files, from one file.

In: names and paths. Out: what lm_eval's `TaskManager.load` gives. lm_eval passes over a file that it cannot read; here
it is an error. Paths of datasets (`dataset_kwargs.data_files`) may be relative to the task's file, or as in lm_eval to
the working folder.
"""

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.registry import METRIC_AGGREGATION_REGISTRY, METRIC_REGISTRY
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from bigmodel.config.settings import UserError

LOCAL_READERS = ("json", "csv", "parquet", "text", "arrow")  # dataset_path of files without a name on the Hub


def load_tasks(named: Sequence[str]) -> Any:
    """Tasks and groups of lm_eval. Each text is a folder (all its tasks), a task file, a name, or several with commas.

    Raises `UserError`: no such task, two of one name, a file that is no task, a dataset that cannot be read.
    """
    folders, wanted, by_name = [], [], []
    for text in named:
        for part in [text] if Path(text).exists() else filter(None, map(str.strip, text.split(","))):
            path = Path(part)
            if path.exists():
                folders.append(path if path.is_dir() else path.parent)
                wanted += _names_in(path)
            else:
                by_name.append(part)
    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=bool(by_name))
    for name in by_name:
        _require_known(name, manager)
    wanted = list(dict.fromkeys([*wanted, *by_name]))
    if not wanted:
        raise UserError("no task is named; give names of lm_eval's tasks, a folder or a file of tasks")
    needed = _with_members(wanted, manager)
    _refuse_two_files(needed, folders)
    for name in needed:
        entry = manager.task_index[name]
        if entry.yaml_path and any(folder.resolve() in entry.yaml_path.resolve().parents for folder in folders):
            with _explained(name, entry.cfg or {}):
                _require_keys(entry)
                _find_files(entry)
    return _load(manager, wanted)


def _with_members(names: Sequence[str], manager: TaskManager) -> list[str]:
    """The names and those of the tasks in groups of them."""
    found = dict.fromkeys(names)
    for name in names:
        members = (manager.task_index[name].cfg or {}).get("task") if name in manager.task_index else None
        for member in members if isinstance(members, list) else ():
            if isinstance(member, str) and member not in found:
                if member not in manager.task_index:
                    raise UserError(f"group {name}: there is no task {member}; correct its name in the group's file")
                found |= dict.fromkeys(_with_members([member], manager))
    return list(found)


def _refuse_two_files(names: Sequence[str], folders: Sequence[Path]) -> None:
    """lm_eval takes one of two files that hold the same name."""
    files: dict[str, Path] = {}
    for file in dict.fromkeys(one.resolve() for folder in folders for one in sorted(folder.rglob("*.yaml"))):
        try:
            table = load_yaml(file, resolve_func=False)
        except (yaml.YAMLError, ValueError, OSError):  # a file that nobody asked for; lm_eval passes over it too
            continue
        name = table.get("group", table.get("task"))
        if not isinstance(name, str) or name not in names:
            continue
        if name in files:
            raise UserError(f"task {name}: both {files[name]} and {file} hold it; rename one of them")
        files[name] = file


def _names_in(path: Path) -> list[str]:
    """Groups of a folder, and its tasks that are in none of them; of a file, its task or group."""
    tables = {file: _read(file) for file in ([path] if path.is_file() else sorted(path.rglob("*.yaml")))}
    names, members = [], set()
    for table in tables.values():
        task, group = table.get("task"), table.get("group")
        if isinstance(group, str):
            names.append(group)
            members |= {one if isinstance(one, str) else one.get("task") for one in task or [] if one}
        elif isinstance(task, str):
            names.append(task)
    if not names:
        raise UserError(
            f"{path}: holds no task; a task is a .yaml file of lm_eval with `task: NAME`, `dataset_path` and "
            "`doc_to_text`"
        )
    return [name for name in names if name not in members]


def _read(file: Path) -> dict[str, Any]:
    try:
        return load_yaml(file, resolve_func=False)
    except (yaml.YAMLError, ValueError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read as a task: {_in_one_line(error)}; correct it or move it away"
        ) from None


def _require_known(name: str, manager: TaskManager) -> None:
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"task {name}: lm_eval {version('lm_eval')} has no task, group or tag of this name, and there is no such "
            f"folder or file{hint or '; `lm-eval ls tasks` lists the names'}"
        )


def _require_keys(entry: Any) -> None:
    """lm_eval says only TypeError where these are missing."""
    table = entry.cfg or {}
    if isinstance(table.get("task"), str) and not table.keys() & {"class", "use_prompt"}:
        of_choices = ("doc_to_choice",) if table.get("output_type") == "multiple_choice" else ()
        for key in ("doc_to_text", "doc_to_target", *of_choices):
            if table.get(key) is None:
                raise UserError(f"{entry.yaml_path}: has no {key}; add it")


def _find_files(entry: Any) -> None:
    """Make the dataset's paths of a local task absolute where they are relative to its file."""
    table = (entry.cfg or {}).get("dataset_kwargs") or {}
    given = table.get("data_files")
    if not given or (entry.cfg or {}).get("dataset_path") not in LOCAL_READERS:
        return
    file = entry.yaml_path
    found = _each(given, lambda path: _place(path, file))
    if found != given:
        config = load_yaml(file)  # with its functions
        entry.cfg = {**config, "dataset_kwargs": {**table, "data_files": found}}
        entry.yaml_path = None


def _each(given: Any, change: Any) -> Any:
    if isinstance(given, dict):
        return {key: _each(value, change) for key, value in given.items()}
    return [change(one) for one in given] if isinstance(given, list) else change(given)


def _place(path: str, file: Path) -> str:
    if "://" in path or Path(path).is_absolute():
        return path
    here, beside = ({one.resolve() for one in folder.glob(path)} for folder in (Path(), file.parent))
    if here and beside and here != beside:
        raise UserError(
            f"{file}: dataset_kwargs.data_files names {path}, which is in {Path().resolve()} and beside the task too; "
            "give the whole path"
        )
    if here or beside:
        return path if here else str((file.parent / path).resolve())
    raise UserError(
        f"{file}: dataset_kwargs.data_files names {path}, which is neither in {Path().resolve()} nor beside the task; "
        "correct the path"
    )


def _load(manager: TaskManager, wanted: list[str]) -> Any:
    """Each task alone, so that an error names it."""
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in wanted:
        entry = manager.task_index.get(name)
        with _explained(name, (entry and entry.cfg) or {}):
            one = manager.load([name])
        for part, found in loaded.items():
            found |= one[part]
    return loaded


@contextlib.contextmanager
def _explained(name: str, table: dict[str, Any]) -> Iterator[None]:
    """What loading a task raises, as a `UserError`. table: its file's content."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a task's file, its functions and its dataset may raise anything
        raise UserError(f"task {name}: cannot be loaded: {_reason(error, table)}; {_remedy(error)}") from error


def _reason(error: Exception, table: dict[str, Any]) -> str:
    """What the error is about, where it does not say it itself; else its text, with its cause."""
    splits = [key for key in table if key.endswith("_split") and error.args == (table[key],)]
    if isinstance(error, KeyError) and splits:
        return f"{splits[0]} = {table[splits[0]]!r}: the dataset has no such split"
    if isinstance(error, StopIteration):
        return "the dataset has no document"
    for one in table.get("metric_list") or ():
        if isinstance(one, dict) and isinstance(metric := one.get("metric"), str) and error.args == (None,):
            near = difflib.get_close_matches(metric, METRIC_REGISTRY, n=1)
            if metric not in METRIC_AGGREGATION_REGISTRY and not one.get("aggregation"):
                hint = f"; did you mean {near[0]!r}?" if near else ""
                return f"metric {metric!r} is none of lm_eval's{hint}"
    cause = f" ({_in_one_line(error.__cause__)})" if error.__cause__ else ""
    return f"{type(error).__name__}: {_in_one_line(error)}{cause}"


def _remedy(error: BaseException) -> str:
    """A dataset from the Hub that is out of reach; else something in the task's file."""
    chain: list[BaseException] = []
    while error and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    if any(isinstance(one, ConnectionError) or "Offline" in type(one).__name__ for one in chain):
        return (
            "a named task downloads its dataset from the Hugging Face Hub: run it once where there is network and "
            "share HF_HOME, or give a folder of local tasks"
        )
    return "correct the task's file or its dataset"


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
