"""Cost of the watch over faults, beside the training step that it watches, in CPU seconds.

    python -m tools.bench_watching [--rounds 10] [--tokens 1024]      writes benchmarks/bench_watching.json

The step: forward, backward and AdamW of a decoder of 24 M weights on packed documents, fp32, one thread; fewer tokens
a step make the share of the watch larger. The watch: the beat (40 changes of phase and a step's end), the sum over the
embedding's gradient, the medians of loss and norm, the hash of all weights every tenth step, the finite check of
weights and moments in a save every hundredth, and the exporter's look at the beats of 8 ranks, four times a second of
wall time. Steps and watch alternate in one process; a row is the median of the rounds.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from bigmodel.checks.scratch import scratch_folder
from bigmodel.config.settings import ModelSettings, SpikeSettings, TrainingSettings
from bigmodel.generation.prompts import pack
from bigmodel.metrics.beat import Beat
from bigmodel.metrics.exporter import POLL_SECONDS
from bigmodel.metrics.hang_watch import HangWatch, Limits
from bigmodel.model.transformer import Transformer
from bigmodel.training.checkpoint.finite import not_finite
from bigmodel.training.nonfinite import Witness
from bigmodel.training.replicas import combined, hash_of
from bigmodel.training.spikes import Spikes
from tools.measure import ROOT, Record

SIZE = {"hidden_size": 384, "num_layers": 10, "num_heads": 6}
VOCABULARY, DOCUMENT = 16_384, 512
PHASES, RANKS, SAVE_EVERY = 40, 8, 100
WITNESS = "sum over the embedding's gradient"


class Training:
    """The step that is watched."""

    def __init__(self, tokens: int) -> None:
        torch.manual_seed(0)
        self.model = Transformer(ModelSettings(**SIZE, tied_embeddings=True), VOCABULARY)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        texts = torch.randint(0, VOCABULARY, (tokens // DOCUMENT, DOCUMENT))
        batch = pack(texts.tolist())
        self.batch = replace(batch, labels=batch.tokens.roll(-1), num_labels=batch.num_tokens)

    def step(self) -> None:
        (self.model(self.batch, "loss").sum() / self.batch.num_labels).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Lookup(torch.nn.Module):
    """The embedding alone, forward and backward, with the witness of values that are not finite or without."""

    def __init__(self, tokens: int, witness: bool) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, SIZE["hidden_size"])
        self.tokens = torch.randint(0, VOCABULARY, (tokens,))
        self.witness = Witness(self) if witness else None

    def step(self) -> None:
        self.embedding(self.tokens).sum().backward()
        if self.witness:
            assert not self.witness.take()


def cpu_seconds(call: Callable[[], object], calls: int = 1) -> float:
    began = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - began) / calls


def beat_of(folder: Path) -> Callable[[], None]:
    beat = Beat(folder, 0, 0)

    def a_step() -> None:
        for _ in range(PHASES):
            beat.enter("forward")
        beat.step_done(1)

    return a_step


@contextmanager
def watch_of(folder: Path) -> Iterator[Callable[[], None]]:
    beats = [Beat(folder, rank, 0) for rank in range(RANKS)]
    records = [{"rank": rank, "pid": os.getpid()} for rank in range(RANKS)]
    watch = HangWatch(folder, folder, Limits(10.0, 600.0), print)

    def look() -> None:
        for beat in beats:
            beat.enter("forward")
        watch.look(records)

    yield look


def spikes_of() -> Callable[[], object]:
    spikes = Spikes(SpikeSettings(), {})
    for number in range(SpikeSettings().window):
        spikes.see(2.0 + number % 7 / 10, 0.5 + number % 5 / 10)
    return lambda: spikes.see(2.2, 0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(ROOT / "benchmarks", "bench_watching", "cpu")
    training = Training(options.tokens)
    without, with_witness = (Lookup(options.tokens, witness) for witness in (False, True))
    weights = list(training.model.parameters())
    training.step()  # allocates
    state = {f"{key}.weight{n}@0": one for n, p in enumerate(weights) for key, one in tensors_of(training, p).items()}
    hash_every = TrainingSettings.model_fields["replica_check_every_steps"].default
    with scratch_folder() as folder, watch_of(folder) as look:
        parts: dict[str, tuple[Callable[[], object], int, float]] = {  # the call, calls a measurement, times a step
            "beat": (beat_of(folder), 1000, 1.0),
            "medians of loss and norm": (spikes_of(), 1000, 1.0),
            "hash of the weights": (lambda: hash_all(weights), 1, 1 / hash_every),
            "finite check of weights and moments": (lambda: not_finite(state), 1, 1 / SAVE_EVERY),
            "look at 8 ranks": (look, 1000, 0.0),
        }
        found: dict[str, list[float]] = {name: [] for name in ["step", WITNESS, *parts]}
        wall = []
        for _ in range(options.rounds):
            began = time.monotonic()
            found["step"].append(cpu_seconds(training.step))
            wall.append(time.monotonic() - began)
            found[WITNESS].append(cpu_seconds(with_witness.step, 20) - cpu_seconds(without.step, 20))
            for name, (call, calls, _) in parts.items():
                found[name].append(cpu_seconds(call, calls))
    report(record, found, {name: times for name, (_, _, times) in parts.items()}, statistics.median(wall))


def tensors_of(training: Training, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    state = training.optimizer.state[parameter]
    named = {"weight": parameter.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    return {name: tensor.flatten() for name, tensor in named.items()}


def hash_all(weights: list[torch.nn.Parameter]) -> int:
    return combined(torch.stack([hash_of(one) for one in weights]).tolist())


def report(record: Record, found: dict[str, list[float]], times: dict[str, float], wall: float) -> None:
    """A row per part, and their sum, as shares of a step."""
    step = statistics.median(found["step"])
    record.add({"case": "step", "contender": "without the watch", "cpu_ms": round(step * 1e3, 3)})
    often_each = {WITNESS: 1.0, **times}
    shares = {name: (statistics.median(found[name]), often) for name, often in often_each.items()}
    shares["look at 8 ranks"] = (shares["look at 8 ranks"][0] / 8, wall / POLL_SECONDS)  # of one rank
    total = 0.0
    for name, (each, often) in shares.items():
        total += each * often
        row = {"cpu_ms": round(each * 1e3, 5), "times_a_step": round(often, 4)}
        record.add({"case": "watch", "contender": name, **row, "percent": round(100 * each * often / step, 4)})
    percent = round(100 * total / step, 3)
    record.add({"case": "watch", "contender": "together", "cpu_ms": round(total * 1e3, 3), "percent": percent})
    record.show(["case", "contender", "cpu_ms", "times_a_step", "percent"])


if __name__ == "__main__":
    main()
