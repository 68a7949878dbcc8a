"""The variants of an ablation: texts of the command line or a file become runs with all their settings.

In: a run file, `--vary` texts or a file of variants. Out: `Variant`s by name, the baseline first, and a `Job` for each
variant and seed. `require_sound` finds every unknown or refused setting before anything runs. Imports no torch.

A file of variants:

    set = ["training.steps=400"]            # for the baseline and all variants
    baseline = "no dropout"                 # its name in the table; default: baseline

    [variants."dropout 0.1"]
    set = ["model.dropout=0.1"]             # as --set

    [variants."taught"]
    run = "student.toml"                    # another run file, relative to this file
    set = ['distillation.teacher="{run:baseline}"']
    against = "student"                     # the difference is to this variant; default: the baseline
    before = [["bigmodel", "export", "{run:baseline}", "{out}/teacher"]]  # commands before the training
    note = "a remark for the table"

    [variants."mean of 3 checkpoints"]      # commands instead of a training, and the JSON file that they write
    commands = [
        ["bigmodel", "average", "{run:baseline}", "{run}", "--last", "3"],
        ["bigmodel", "evaluate", "{run}", "--output", "{out}/result.json"],
    ]
    result = "{out}/result.json"
    key = "validation.nats_per_token"       # of the loss in it; this is the default
    # pattern = "loss: ([0-9.]+)"           # instead of key: result is a text, and the group is the loss

{run}, {out} and {seed}: the job's run directory, folder for other files, and seed. {run:NAME}: the run directory of
another variant with the same seed, which runs first. {data}, in commands only: the folder of the variant's data.
"""

import hashlib
import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import Settings, UserError, load_settings, settings_from_table, to_toml_table
from bigmodel.run_directory import changes, read_json, write_json

PLACEHOLDER = re.compile(r"\{(run|out|seed|run:[^{}]+)\}")
DATA = "{data}"
SAFE_NAME = re.compile(r"[\w.=+-]{1,60}", re.ASCII)
BASELINE = "baseline"
LOSS = "validation.nats_per_token"  # in what `bigmodel evaluate --output` writes
KEYS = {
    "set": list, "run": str, "against": str, "before": list, "commands": list, "result": str, "key": str,
    "pattern": str, "note": str,
}  # fmt: skip
TOP_KEYS = {"set": list, "baseline": str, "variants": dict}
BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}
OF_A_JOB = {"run.seed": "--seeds", "run.directory": "--out"}  # settings of which each job has its own
Command = tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """One row of the table. `overrides` are texts for --set. A variant with `commands` is not trained."""

    name: str
    run_file: Path
    overrides: tuple[str, ...] = ()
    against: str = BASELINE
    before: tuple[Command, ...] = ()
    commands: tuple[Command, ...] = ()
    result: str = ""
    key: str = LOSS
    pattern: str = ""
    note: str = ""

    @property
    def needs(self) -> list[str]:
        """The variants whose run directories it names."""
        texts = [*self.overrides, *(word for command in self.before + self.commands for word in command)]
        found = [match[1] for text in texts for match in PLACEHOLDER.finditer(text)]
        return list(dict.fromkeys(one.removeprefix("run:") for one in found if one.startswith("run:")))


# ---- reading


def from_texts(run_file: Path, texts: Sequence[str], grid: bool) -> list[Variant]:
    """The baseline and a variant per value of each `SETTING=VALUE,VALUE`, or per combination. Raises `UserError`."""
    choices = [list(values_of(text)) for text in texts]
    settings = [key_of(text) for text in texts]
    if repeated := sorted({name for name in settings if settings.count(name) > 1}):
        raise UserError(f"--vary {repeated[0]}: given twice; put all its values into one, separated by commas")
    alone = [(one,) for some in choices for one in some]
    chosen = dict.fromkeys(itertools.product(*choices) if grid else alone)
    return [Variant(BASELINE, run_file), *(Variant(", ".join(some), run_file, some) for some in chosen)]


def key_of(text: str) -> str:
    key, equals, values = text.partition("=")
    if not equals or not values or "." not in key:
        raise UserError(f"--vary {text}: must have the form section.key=value,value")
    return key.strip()


def values_of(text: str) -> Iterator[str]:
    """`a.b=[1,2],3` -> `a.b=[1,2]` and `a.b=3`: commas in brackets and quotes belong to a value."""
    key = key_of(text)
    depth, quote, value = 0, "", ""
    for sign in text.partition("=")[2] + ",":
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign == "," and depth == 0:
            if not value.strip():
                raise UserError(f"--vary {text}: has an empty value; for an empty text write {key}='\"\"'")
            yield f"{key}={value.strip()}"
            value = ""
            continue
        depth += 0 if quote else BRACKETS.get(sign, 0)
        value += sign
    if value.strip():
        raise UserError(f"--vary {text}: a bracket or quote is not closed")


def from_file(run_file: Path, file: Path) -> tuple[list[Variant], list[str]]:
    """The variants of a file, the baseline first, and its overrides for all of them. Raises `UserError`."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}; give a file of variants in TOML") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file}: not valid TOML: {error}") from None
    _require_keys(table, TOP_KEYS, str(file))
    if not table.get("variants"):
        raise UserError(f'{file}: has no variants; add [variants."a name"] with set = ["section.key=value"]')
    baseline = table.get("baseline", BASELINE)
    variants = [Variant(baseline, run_file, against=baseline)]
    for name, given in table["variants"].items():
        where = f'{file}: [variants."{name}"]'
        _require_keys(given, KEYS, where)
        variants.append(_variant(name, given, run_file, file.parent, baseline, where))
    _require_names(variants, file)
    return variants, _texts(table.get("set", []), f"{file}: set")


def _variant(name: str, given: dict[str, Any], run_file: Path, folder: Path, baseline: str, where: str) -> Variant:
    before, commands = (_commands(given.get(kind, []), f"{where}: {kind}") for kind in ("before", "commands"))
    if bool(commands) != ("result" in given):
        raise UserError(f"{where}: commands and result belong together: the file that the commands write")
    if commands and (before or "set" in given):
        raise UserError(f"{where}: is not trained, so that set and before have no effect; put all into commands")
    for key in given.keys() & {"key", "pattern"}:
        if not commands:
            raise UserError(f"{where}: {key} has no effect without result")
    if {"key", "pattern"} <= given.keys():
        raise UserError(f"{where}: key is for a JSON file, pattern for a text; give only one of them")
    if DATA in given.get("result", ""):
        raise UserError(f"{where}: result = {given['result']!r}: {DATA} is for commands; write it below {{out}}")
    try:
        groups = re.compile(given.get("pattern", "(.)")).groups
    except re.error as error:
        raise UserError(f"{where}: pattern = {given['pattern']!r} is no regular expression: {error}") from None
    if not groups:
        raise UserError(f"{where}: pattern = {given['pattern']!r} has no group; put the loss in ( )")
    return Variant(
        name,
        folder / given["run"] if "run" in given else run_file,
        tuple(_texts(given.get("set", []), f"{where}: set")),
        given.get("against", baseline),
        before,
        commands,
        given.get("result", ""),
        given.get("key", LOSS),
        given.get("pattern", ""),
        given.get("note", ""),
    )


def _require_keys(table: Any, known: Mapping[str, type], where: str) -> None:
    if not isinstance(table, dict):
        raise UserError(f"{where}: must be a table")
    for key, value in table.items():
        if key not in known:
            raise UserError(f"{where}: {key} is unknown; known: {', '.join(known)}")
        if not isinstance(value, known[key]):
            raise UserError(f"{where}: {key} = {value!r}: must be a {known[key].__name__}")


def _texts(given: list[Any], where: str) -> list[str]:
    if wrong := [one for one in given if not isinstance(one, str)]:
        raise UserError(f'{where}: {wrong[0]!r} must be a text of the form "section.key=value"')
    return given


def _commands(given: list[Any], where: str) -> tuple[Command, ...]:
    for command in given:
        if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
            raise UserError(f"{where}: {command!r} must be a list of words, the first one the program")
    return tuple(tuple(command) for command in given)


def _require_names(variants: Sequence[Variant], file: Path) -> None:
    """Every variant that another one names exists, and none needs itself."""
    by_name = {variant.name: variant for variant in variants}
    if len(by_name) < len(variants):
        raise UserError(f"{file}: a variant has the name of the baseline, {variants[0].name!r}; rename one of them")
    for variant in variants:
        for name in (variant.against, *variant.needs):
            if name not in by_name:
                raise UserError(
                    f"{file}: {variant.name!r} names {name!r}, which is no variant; known: {', '.join(by_name)}"
                )
        waiting, seen = list(variant.needs), set[str]()
        while waiting:
            name = waiting.pop()
            if name == variant.name:
                raise UserError(f"{file}: {name!r} needs its own result; remove its {{run:...}} from the circle")
            if name not in seen:
                seen.add(name)
                waiting += by_name[name].needs


# ---- jobs


@dataclass(frozen=True)
class Job:
    """A variant with a seed, below `out`. `common`: overrides of all variants, before those of the variant."""

    variant: Variant
    seed: int
    out: Path
    common: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def directory(self) -> Path:
        """The run directory."""
        return run_directory(self.out, self.variant.name, self.seed)

    def beside(self, ending: str) -> Path:
        """A file or folder beside the run directory."""
        return self.directory.with_name(f"{self.directory.name}.{ending}")

    @property
    def overrides(self) -> list[str]:
        """For --set."""
        own = [f"run.seed={self.seed}", f"run.directory={json.dumps(str(self.directory))}"]
        given = [*self.common, *map(self.filled, self.variant.overrides), *own]
        return [*given, *data_folder(self.variant.run_file, given, self.out)]

    def filled(self, text: str) -> str:
        """The text with the values of its placeholders."""
        values = {"run": self.directory, "out": self.beside("files"), "seed": self.seed}

        def value(match: re.Match[str]) -> str:
            name = match[1]
            if name.startswith("run:"):
                return str(run_directory(self.out, name.removeprefix("run:"), self.seed))
            return str(values[name])

        return PLACEHOLDER.sub(value, text)

    def command(self, words: Sequence[str]) -> list[str]:
        """The words of a command with the values of their placeholders."""
        filled = [self.filled(word) for word in words]
        if not any(DATA in word for word in filled):
            return filled
        folder = str(self.settings().data.directory)
        return [word.replace(DATA, folder) for word in filled]

    def in_words(self) -> str:
        """Its overrides, or its commands."""
        if self.variant.commands:
            return "; ".join(shlex.join(self.command(command)) for command in self.variant.commands)
        return shlex.join(self.overrides)

    def settings(self) -> Settings:
        return load_settings(self.variant.run_file, self.overrides)


def run_directory(out: Path, name: str, seed: int) -> Path:
    """OUT/runs/NAME/seed-N; names that are no good file names get a digest."""
    safe = re.sub(r"[^\w.=+-]+", "-", name, flags=re.ASCII).strip("-.")[:60]
    if not SAFE_NAME.fullmatch(name) or safe != name:
        safe = f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return out / "runs" / safe / f"seed-{seed}"


def data_folder(run_file: Path, overrides: Sequence[str], out: Path) -> list[str]:
    """The override of data.directory: none where `prepare` is as in the run file or the folder is given; else a folder
    below `out` that all variants with the same `prepare` share."""
    if any(text.partition("=")[0].strip() in ("data.directory", "data") for text in overrides):
        return []
    prepare = [text for text in overrides if text.partition("=")[0].strip().partition(".")[0] == "prepare"]
    if not prepare:
        return []
    plain, varied = (load_settings(run_file, some).prepare.model_dump(mode="json") for some in ([], prepare))
    if plain == varied:
        return []
    digest = hashlib.sha256(json.dumps(varied, sort_keys=True).encode()).hexdigest()[:12]
    return [f"data.directory={json.dumps(str(out / 'data' / digest))}"]


# ---- checks before anything runs


def require_sound(jobs: Sequence[Job], ranks: int) -> list[Job]:
    """The jobs without `--vary` values that are the baseline's own. Raises one `UserError` with all problems.

    What a variant reads from a run that is not there yet is checked when that run is finished.
    """
    problems, tables = [], dict[str, Any]()
    for job in first_of_each(jobs):
        if job.variant.commands:
            continue
        problems += _of_a_job(job)
        try:
            settings = job.settings()
            tables[job.variant.name] = _compared(settings)
            resolve_deepspeed(settings, ranks)
            problems += _without_a_loss(job, settings)
        except UserError as error:
            if not any(not run_directory(job.out, name, job.seed).exists() for name in job.variant.needs):
                problems.append(f"{job.variant.name}: {error}")
    problems += [problem for job in jobs for problem in _begun_otherwise(job)]
    if problems:
        raise UserError("nothing was started:\n" + "\n".join(f"  {problem}" for problem in problems))
    return _without_copies(jobs, tables)


def _of_a_job(job: Job) -> list[str]:
    """Problems: settings that every job has of its own and that would be without effect."""
    keys = [text.partition("=")[0].strip() for text in (*job.common, *job.variant.overrides)]
    return [
        f"{job.variant.name}: {key} has no effect, {option} says it; leave it out"
        for key, option in OF_A_JOB.items()
        if key in keys
    ]


def first_of_each(jobs: Sequence[Job]) -> list[Job]:
    """The first job of every variant."""
    first: dict[str, Job] = {}
    for job in jobs:
        first.setdefault(job.variant.name, job)
    return list(first.values())


def _without_a_loss(job: Job, settings: Settings) -> list[str]:
    """A problem if the run has no evaluation after its last step."""
    every, steps = settings.evaluation.every_steps, settings.training.steps
    judged = settings.checkpoint.keep_best or settings.training.early_stop  # then the last step is evaluated
    if settings.evaluation.at_end or (judged and every and steps % every == 0):
        return []
    return [f"{job.variant.name}: evaluation.at_end = false: there is no validation loss at the end; set it to true"]


def _compared(settings: Settings) -> dict[str, Any]:
    """The settings as plain values, without the names of folders and the seed."""
    table = to_toml_table(settings)
    return table | {"run": {}, "data": {key: value for key, value in table["data"].items() if key != "directory"}}


def _without_copies(jobs: Sequence[Job], tables: Mapping[str, Any]) -> list[Job]:
    first: dict[str, str] = {}
    copies = {}
    for variant in (job.variant for job in first_of_each(jobs)):
        name = variant.name
        if name not in tables or variant.before:
            continue
        text = json.dumps([str(variant.run_file), tables[name]], sort_keys=True)
        if text in first:
            copies[name] = first[text]
        first.setdefault(text, name)
    needed = {name for job in jobs for name in (*job.variant.needs, job.variant.against)}
    for name, other in copies.items():
        if name in needed:
            raise UserError(f"{name!r} has the settings of {other!r}; remove one of them, or change a setting")
        print(f"{name}: has the settings of {other!r}, and is left out")
    return [job for job in jobs if job.variant.name not in copies]


# ---- what a job was begun with


def record_begin(job: Job) -> None:
    """Write what the job is, before its first start."""
    write_json(job.beside("job.json"), _identity(job))


def _identity(job: Job) -> dict[str, Any]:
    variant = job.variant
    commands = [shlex.join(command) for command in variant.before + variant.commands]
    settings = None if variant.commands else to_toml_table(job.settings())
    return {"variant": variant.name, "commands": commands, "result": variant.result, "settings": settings}


def _begun_otherwise(job: Job) -> list[str]:
    """Problems: a job that was begun with other settings or commands cannot go on with these."""
    file = job.beside("job.json")
    if not file.exists():
        return []
    then, remedy = read_json(file), f"choose another --out, or delete {job.directory.parent}"
    try:
        now = _identity(job)
        for one in (then, now):  # settings that a later version added have their defaults
            if one["settings"] is not None:
                one |= _compared(settings_from_table(one.pop("settings"), file, saved=True))
    except UserError as error:
        return [f"{job.title}: {error}; or {remedy}"]
    found = [f"{name} {a!r} -> {b!r}" for name, a, b in changes(then, now)]
    return [f"{job.title}: was begun with other settings: {', '.join(found[:3])}; {remedy}"] if found else []
