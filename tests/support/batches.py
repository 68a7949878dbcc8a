"""The batches that a model sees, as hashes of its input tensors: recorded by its ranks, read by whoever compares."""

import json
import os
import time
from collections import defaultdict
from pathlib import Path

from bigmodel.run_directory import read_json_lines


def record_batches(run_file: Path) -> None:
    """In a trainer: write a line per batch of the model into RUN.batches beside the run directory.

    RECORDED_STEP_SECONDS in the environment makes each step longer.
    """
    from bigmodel.data.load.stream import Stream
    from bigmodel.model.transformer import Transformer

    folder = run_file.with_suffix(".batches")
    folder.mkdir(exist_ok=True)
    forward, following, now = Transformer.forward, Stream.__next__, [-1]
    slow = float(os.environ.get("RECORDED_STEP_SECONDS", "0"))

    def recorded_next(self):
        time.sleep(slow)
        step = following(self)
        now[0] = step.number
        return step

    def recorded_forward(self, batch, *arguments, **more):
        if batch.num_tokens:
            line = {"process": os.getpid(), "step": now[0] + 1, "fingerprint": batch.fingerprint()}
            with open(folder / f"rank-{os.environ['RANK']}.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        return forward(self, batch, *arguments, **more)

    Stream.__next__, Transformer.forward = recorded_next, recorded_forward  # type: ignore[method-assign]


def batches_of(run: Path) -> dict[int, list[str]]:
    """Step -> sorted hashes of the model's input tensors over all ranks; a repeated step counts once."""
    found = defaultdict(list)
    for file in run.with_suffix(".batches").iterdir():
        lines = list(read_json_lines(file))
        last = {line["step"]: line["process"] for line in lines}
        for line in lines:
            if line["process"] == last[line["step"]]:
                found[line["step"]].append(line["fingerprint"])
    return {step: sorted(fingerprints) for step, fingerprints in found.items()}
