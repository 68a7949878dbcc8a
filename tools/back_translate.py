"""Back-translation on the embedded pairs (Sennrich et al. 2016): what pairs are worth whose source a model made.

    python -m tools.back_translate                                 # 300 steps of configs/seq2seq.toml, two seeds
    python -m tools.back_translate --steps 20 --seeds 1 --made 50 --work runs/short --out runs/short

Half of the pairs of function and description count as written by people; of the others only the descriptions are used.
A model that learnt the way back writes a function for each (sampled, temperature 0.8). Then three runs of equal steps
are scored on the same validation pairs: half of the pairs; the same and the made ones, with a tag, as 30% of the
tokens; and all pairs, which is the most that could be won. Out: a table, back_translate.json.

Restartable: what is finished is not repeated, and a run that was killed goes on from its checkpoint.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from bigmodel.config.settings import UserError, load_settings
from bigmodel.data.prepare.embedded import standard_library, write_embedded_pairs
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.distributed.world import ALONE
from bigmodel.evaluation.evaluate import Validation
from bigmodel.run_directory import EXIT_USER, read_json, write_atomically, write_json
from bigmodel.training.load_model import load_trained
from tools.ablate import numbers_of
from tools.measure import Record

ROOT = Path(__file__).parents[1]
RUN_FILE = ROOT / "configs" / "seq2seq.toml"
SHAPE = {"data.sequence_length": 256, "data.source_sequence_length": 612}  # of a packed sequence, in tokens
BACK = {
    "data.sequence_length": 612, "data.max_document_length": 192,
    "data.source_sequence_length": 256, "data.max_source_length": 64,
}  # fmt: skip
MADE_SHARE, MOST_TOKENS = 0.3, 128
FORMS = ("half of the pairs", "half, and made sources", "all pairs")
WRITTEN = ["half"], ["half", "made"], ["half", "rest"]  # the sources of each form


def compare(
    steps: Annotated[int, typer.Option(min=2, help="steps of each run")] = 300,
    seeds: Annotated[str, typer.Option(help="seeds, separated by commas")] = "1,2",
    made: Annotated[int, typer.Option(min=1, help="descriptions for which a function is made")] = 1000,
    work: Annotated[Path, typer.Option(help="folder of the runs")] = ROOT / "runs" / "back-translation",
    out: Annotated[Path, typer.Option(help="folder of the numbers")] = ROOT / "benchmarks",
) -> None:
    """Train what is not finished, then compare. Raises `UserError`."""
    numbers, head = numbers_of(seeds), Record(out, "back_translate", "cpu").head
    work.mkdir(parents=True, exist_ok=True)
    count = write_pairs(work)
    tokenizer = prepare(work, ["half", "rest"], "all", None) / "tokenizer.json"
    found: dict[str, list[float]] = {name: [] for name in FORMS}
    for seed in numbers:
        write_made(work, seed, steps, made, tokenizer)
        for name, sources in zip(FORMS, WRITTEN, strict=True):
            of_seed = [f"made-{seed}" if one == "made" else one for one in sources]
            found[name].append(loss_of(work, "-".join(of_seed), of_seed, seed, steps, tokenizer))
            print(f"{name}, seed {seed}: {found[name][-1]:.4f} nats", flush=True)
            write_json(
                out / "back_translate.json", {**head, "steps": steps, "pairs": count, "made": made, "forms": found}
            )
    show(found)


def write_pairs(work: Path) -> int:
    """half.parquet and rest.parquet; a module is in one of them. Returns the number of all pairs."""
    if not (work / "summaries.parquet").exists():
        write_embedded_pairs(work, standard_library())
    rows = pq.read_table(work / "summaries.parquet").to_pylist()
    for name, odd in (("half", False), ("rest", True)):
        chosen = [row for row in rows if hashlib.sha256(row["key"].encode()).digest()[0] % 2 == odd]
        pq.write_table(pa.Table.from_pylist(chosen), work / f"{name}.parquet")
    return len(rows)


def write_made(work: Path, seed: int, steps: int, made: int, tokenizer: Path) -> None:
    """made-SEED.parquet: descriptions of the rest, each with a function by the model of the way back."""
    file = work / f"made-{seed}.parquet"
    if file.exists():
        return
    back = run_file(work, f"back-{seed}", ["half"], tokenizer, columns=("target", "text"))
    data = prepare(work, ["half"], f"back-{seed}", tokenizer, back)
    train(back, work / f"back-{seed}-run", data, seed, steps, BACK)
    known = Tokenizer.load(tokenizer, fast=False)
    all_targets = pq.read_table(work / "rest.parquet")["target"].to_pylist()
    targets = [one for one in all_targets if len(known.encode(one)) < BACK["data.max_source_length"]][:made]
    prompts = work / f"prompts-{seed}.jsonl"
    prompts.write_text("".join(json.dumps(one) + "\n" for one in targets), encoding="utf-8")
    words = [
        "generate",
        str(work / f"back-{seed}-run"),
        "--prompts",
        str(prompts),
        "--batch",
        "32",
        "--seed",
        str(seed),
    ]
    answers = bigmodel([*words, "--tokens", str(MOST_TOKENS), "--temperature", "0.8"]).splitlines()
    rows = [{"text": json.loads(line)["text"], "target": one} for line, one in zip(answers, targets, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), file)


def run_file(
    work: Path, name: str, sources: list[str], tokenizer: Path | None, columns: tuple[str, str] = ("text", "target")
) -> Path:
    """configs/seq2seq.toml with these sources; a description is in training or in validation, in all runs alike."""
    text = RUN_FILE.read_text(encoding="utf-8").replace('"deepspeed/', f'"{RUN_FILE.parent}/deepspeed/')
    _, begin, rest = text.partition("[data]")
    given = f'tokenizer = "{tokenizer}"' if tokenizer else "vocabulary = 1024"
    # Small shards: each lane needs one of each source.
    lines = ["[run]", 'directory = "none"', "[prepare]", given, "validation_share = 0.05", "shard_tokens = 2_000"]
    for source in sources:
        lines += ["[[prepare.sources]]", f'name = "{source}"', f'files = ["{work / source}.parquet"]']
        lines += [f'column = "{columns[0]}"', f'target_column = "{columns[1]}"', 'split_by = "target"']
        lines += ['tag = "<BT> "'] if source.startswith("made") else []
    file = work / f"{name}.toml"
    write_atomically(file, "\n".join([*lines, begin + rest]))
    return file


def prepare(work: Path, sources: list[str], name: str, tokenizer: Path | None, file: Path | None = None) -> Path:
    """The prepared folder."""
    data = work / f"{name}-data"
    if not (data / "manifest.json").exists():
        made = file or run_file(work, name, sources, tokenizer)
        bigmodel(["prepare", str(made), "--set", f"data.directory={data}"])
    return data


def train(file: Path, directory: Path, data: Path, seed: int, steps: int, more: dict[str, Any]) -> None:
    if (directory / "finished").exists():
        return
    values = {
        "training.steps": steps, "schedule.warmup_steps": min(30, steps // 10), "schedule.decay_steps": steps // 2,
        "evaluation.every_steps": 0, "evaluation.at_end": "false", "run.seed": seed, "run.directory": directory,
        "data.directory": data, **more,
    }  # fmt: skip
    given = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    bigmodel(["launch", "local", str(file), "--ranks", "1", *given])
    (directory / "finished").touch()


def loss_of(work: Path, name: str, sources: list[str], seed: int, steps: int, tokenizer: Path) -> float:
    """Nats per label on the validation pairs, of a run on these sources."""
    file, directory = run_file(work, name, sources, tokenizer), work / f"{name}-run-{seed}"
    data = prepare(work, sources, name, tokenizer, file)
    made = [one for one in sources if one.startswith("made")]
    mix = {one: MADE_SHARE if one in made else 1 - MADE_SHARE for one in sources} if made else {}
    shares = ", ".join(f'"{one}" = {share}' for one, share in mix.items())
    train(file, directory, data, seed, steps, SHAPE | ({"data.mix": f"{{ {shares} }}"} if mix else {}))
    result = directory / "validation.json"
    if not result.exists():
        trained = load_trained(directory)
        pairs = load_settings(work / "all.toml", [f"data.directory={work / 'all-data'}"]).data
        loss = Validation(pairs, 1).run(trained.forward, ALONE).nats_per_token
        write_json(result, {"nats_per_token": loss})
    return float(read_json(result)["nats_per_token"])


def bigmodel(words: list[str]) -> str:
    """Run a command; returns its output. Ends this program if it fails: the command has said why."""
    alone: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for each other are slow
    done = subprocess.run([sys.executable, "-m", "bigmodel", *words], stdout=subprocess.PIPE, text=True, env=alone)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def show(found: dict[str, list[float]]) -> None:
    table = Table(title="nats per label on the validation pairs")
    for column in ("training pairs", "loss", "beside half of the pairs", "seeds"):
        table.add_column(column)
    first = found[FORMS[0]]
    for name, losses in found.items():
        more = fmean(b - a for a, b in zip(first, losses, strict=True))
        table.add_row(name, f"{fmean(losses):.4f}", f"{more:+.4f}", " ".join(f"{one:.4f}" for one in losses))
    Console(markup=False, emoji=False).print(table)


def main() -> None:
    try:
        typer.run(compare)
    except UserError as error:
        print(f"back_translate: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER) from None


if __name__ == "__main__":
    main()
