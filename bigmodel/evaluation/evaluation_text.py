"""An evaluation as text of at most 80 columns and as values for JSON.

In: an `Evaluation`. Out: a line with the sums, a table by objective and source, a table of the calibration; or a dict.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bigmodel.evaluation.evaluate import Evaluation
from bigmodel.sizes import counted_noun

NAME_COLUMNS = 21  # of a source's name, at most


def to_values(evaluation: Evaluation) -> dict[str, Any]:
    """All numbers of the evaluation and what follows from them."""
    if evaluation.scores:
        found = {"nats_per_document": evaluation.nats_per_token, "num_documents": evaluation.num_labels}
        return found | evaluation.scores.numbers() | {"confusion": evaluation.scores.counts.tolist()}
    parts = [
        asdict(part)
        | {"nats_per_token": part.nats_per_token, "bits_per_byte": part.bits_per_byte, "accuracy": part.accuracy}
        | {"perplexity": perplexity(part.nats_per_token)}
        for part in evaluation.parts
    ]
    return {
        "nats_per_token": evaluation.nats_per_token,
        "perplexity": perplexity(evaluation.nats_per_token),
        "bits_per_byte": evaluation.bits_per_byte,
        "accuracy": evaluation.accuracy,
        "calibration_error": evaluation.calibration_error,
        "num_labels": evaluation.num_labels,
        "text_bytes": evaluation.text_bytes,
        "parts": parts,
        "calibration": [asdict(one) for one in evaluation.bins],
    }


def to_lines(evaluation: Evaluation) -> Iterator[str]:
    yield (
        f"perplexity {perplexity(evaluation.nats_per_token):.4g}, next-token accuracy {evaluation.accuracy:.1%}, "
        f"calibration error {evaluation.calibration_error:.1%}"
    )
    yield ""
    yield f"{'source':<{NAME_COLUMNS}} {'objective':<18}{'tokens':>13}{'nats':>8}{'bits/byte':>10}{'accuracy':>9}"
    for part in evaluation.parts:
        bits = "" if part.bits_per_byte is None else f"{part.bits_per_byte:.3f}"
        yield (
            f"{_short(part.source):<{NAME_COLUMNS}} {part.objective:<18}{part.num_labels:>13,}"
            f"{part.nats_per_token:>8.3f}{bits:>10}{part.accuracy:>9.1%}"
        )
    yield ""
    yield f"{'probability of the likeliest token':<36}{'tokens':>14}{'mean':>9}{'accuracy':>11}"
    for one in evaluation.bins:
        if one.num_labels:
            mean, right = one.confidence_sum / one.num_labels, one.num_right / one.num_labels
            yield f"{f'{one.low:.1%} to {one.high:.1%}':<36}{one.num_labels:>14,}{mean:>9.1%}{right:>11.1%}"


def heading(step: int, evaluation: Evaluation) -> str:
    unit = "document" if evaluation.scores else "token"
    return f"step {step}: {evaluation} over {counted_noun(evaluation.num_labels, unit)}"


def perplexity(nats_per_token: float) -> float:
    """exp(nats per label); infinite beyond the range of floats."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def _short(name: str) -> str:
    return name if len(name) <= NAME_COLUMNS else name[: NAME_COLUMNS - 3] + "..."
