"""Scaling laws beside a plan: tokens per parameter, compute-optimal tokens and size, over-training. Imports no torch.

In: a `Context`, perhaps a law that `bigmodel sweep` has fitted. Out: a `Part`. Hoffmann et al. 2022 ("Chinchilla"),
approach 3:

    L(N, D) = E + A / N^a + B / D^b,   C = 6 N D

with N all parameters, of experts those that a token passes, and D the tokens of the run; nats per label. The constants
are the corrected ones of Besiroglu et al. 2024 (arXiv 2404.10102); those that Hoffmann et al. printed contradict their
own approaches 1 and 2. Least L at a given C is where a A / N^a = b B / D^b. Limits: the constants are those of decoders
on MassiveText with its tokenizer: they say how to divide compute, not what the loss will be, which only a law of the
user's own runs predicts.

Example: 70e9 parameters are optimal with 1.29e12 tokens, 18.4 each; Chinchilla had 1.4e12.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bigmodel.config.settings import Settings, UserError, positions_before
from bigmodel.planning.context import Context
from bigmodel.planning.parameters import active_of, parameters_of
from bigmodel.planning.part import Part, Row

TITLE = "Scaling law"
FORMS = (("compute",), ("parameters", "tokens"))  # what the terms of a law may be of
STEEPEST = 10.0  # exponent of a law: of training runs it is below 1


class Term(NamedTuple):
    """coefficient / x^exponent, with x: parameters, tokens or compute."""

    of: str
    coefficient: float
    exponent: float


@dataclass(frozen=True)
class Law:
    """L = irreducible + the sum of terms, in nats per label."""

    irreducible: float
    terms: tuple[Term, ...]

    def loss(self, parameters: float, tokens: float) -> float:
        sizes = {"parameters": parameters, "tokens": tokens, "compute": 6 * parameters * tokens}
        return self.irreducible + sum(one.coefficient / sizes[one.of] ** one.exponent for one in self.terms)

    def optimal_tokens(self, parameters: float) -> float:
        """Tokens with which a model of that size is the best of its compute. Needs terms of parameters and tokens."""
        size, data = self._two_terms()
        slope = size.exponent * size.coefficient / parameters**size.exponent
        return float((data.exponent * data.coefficient / slope) ** (1 / data.exponent))

    def optimal_parameters(self, compute: float) -> float:
        """Parameters of the model with the least loss at that compute."""
        size, data = self._two_terms()
        ratio = (size.exponent * size.coefficient) / (data.exponent * data.coefficient)
        total = size.exponent + data.exponent
        return float(ratio ** (1 / total) * (compute / 6) ** (data.exponent / total))

    def _two_terms(self) -> tuple[Term, Term]:
        by_name = {one.of: one for one in self.terms}
        assert set(by_name) == {"parameters", "tokens"}, f"no optimum in a law of {', '.join(by_name)}"
        return by_name["parameters"], by_name["tokens"]

    def as_table(self) -> dict[str, Any]:
        return {"irreducible": self.irreducible, "terms": [one._asdict() for one in self.terms]}

    def in_words(self) -> str:
        letters = {"parameters": "N", "tokens": "D", "compute": "C"}
        terms = "".join(f" + {one.coefficient:.4g} / {letters[one.of]}^{one.exponent:.3f}" for one in self.terms)
        return f"L = {self.irreducible:.3f}{terms}"


CHINCHILLA = Law(1.8172, (Term("parameters", 482.01, 0.3478), Term("tokens", 2085.43, 0.3658)))


def read_law(file: Path) -> Law:
    """The law in a result of `bigmodel sweep`. Raises `UserError`."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        return law_of(table["law"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = error.strerror if isinstance(error, OSError) else "has no law"
        raise UserError(f"{file}: {problem}; give the sweep.json of a `bigmodel sweep` with a fitted law") from None


def law_of(table: Mapping[str, Any]) -> Law:
    """Raises `ValueError`, `KeyError` or `TypeError` where a number is missing or cannot be one of a law."""
    terms = tuple(Term(one["of"], float(one["coefficient"]), float(one["exponent"])) for one in table["terms"])
    law = Law(float(table["irreducible"]), terms)
    numbers = [law.irreducible, *(number for one in terms for number in (one.coefficient, one.exponent))]
    is_known, is_flat = tuple(one.of for one in terms) in FORMS, all(one.exponent <= STEEPEST for one in terms)
    if not (is_known and is_flat and all(0 <= number < math.inf for number in numbers)):
        raise ValueError
    return law


def size_of(settings: Settings, vocabulary: int) -> tuple[int, int]:
    """Parameters, as in the law, and tokens of the run. `vocabulary`: rows of the embedding."""
    parameters = active_of(parameters_of(settings, vocabulary), settings)
    return parameters, positions_before(settings.training.steps, settings)


def scaling_part(context: Context, law: Law | None = None) -> Part:
    """`law`: fitted to the user's own runs."""
    settings = context.settings
    parameters, tokens = size_of(settings, context.vocabulary)
    numbers: dict[str, Any] = {"parameters": parameters, "tokens": tokens, "tokens_per_parameter": tokens / parameters}
    rows = [
        Row("parameters", _short(parameters), "that a token passes" if settings.model.experts else ""),
        Row("tokens", _short(tokens), "training.steps, padding included"),
        Row("tokens per parameter", f"{tokens / parameters:.3g}"),
    ]
    if why := _not_a_pretraining(settings):
        return Part(TITLE, [*rows, Row("compute-optimal", "-", why)], numbers)
    compute = 6 * parameters * tokens
    optimal, size = CHINCHILLA.optimal_tokens(parameters), CHINCHILLA.optimal_parameters(compute)
    ratio = tokens / optimal
    source = "Hoffmann et al. 2022, approach 3, constants of Besiroglu et al. 2024"
    rows += [
        Row("compute-optimal tokens", _short(optimal), f"for this size; {source}"),
        Row("over-training", f"{ratio:.3g} times", _meaning(ratio)),
        Row(
            "best size for this compute",
            f"{_short(size)} parameters",
            f"with {_short(compute / 6 / size)} tokens: the least loss, not the cheapest model to serve",
        ),
    ]
    numbers |= {
        "optimal_tokens": optimal,
        "overtraining": ratio,
        "compute_flops": compute,
        "optimal_parameters": size,
        "optimal_tokens_of_compute": compute / 6 / size,
    }
    if law is not None:
        numbers["predicted_loss_nats"] = law.loss(parameters, tokens)
        rows.append(Row("predicted loss", f"{numbers['predicted_loss_nats']:.3f} nats per label", law.in_words()))
    return Part(TITLE, rows, numbers)


def _not_a_pretraining(settings: Settings) -> str:
    """Why the law says nothing of this run; empty if it does."""
    if settings.model.kind != "decoder":
        return f"the law is of decoders, and model.kind = {json.dumps(settings.model.kind)}"
    if settings.model.start_folder or settings.lora.rank or settings.classification.classes:
        return "the law is of pretraining from initial weights"
    return ""


def _meaning(ratio: float) -> str:
    if ratio < 0.8:
        return "too few tokens for this size: a smaller model would be better at this compute"
    if ratio <= 1.25:
        return "near the optimum"
    return "a smaller model for longer: dearer to train than an optimal one of its loss, cheaper to serve"


def _short(number: float) -> str:
    """Three digits and a unit: 1.24 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            digits = max(0, 2 - math.floor(math.log10(number / size)))
            return f"{number / size:.{digits}f} {unit}"
    return f"{number:.0f}"
