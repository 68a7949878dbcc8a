"""Quantized exports: the forms of `bigmodel export --quantize`, the loss before and after, the model card.

In: the weights of an export. Out: a folder that transformers loads (int8), or a GGUF file (q8_0). Guarantee: the loss
"after" is that of the weights that a reader gets, on the validation split, packed as in training. Costs: writing holds
one matrix; the two evaluations hold the whole model in fp32.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigmodel.config.settings import ModelSettings, Settings, UserError
from bigmodel.distributed.world import ALONE
from bigmodel.evaluation.classify import make_validation
from bigmodel.exchange import gguf_file, int8
from bigmodel.model.huggingface.folder import MAX_BYTES, Described
from bigmodel.model.huggingface.weights import Names, names_of
from bigmodel.training.load_model import load_trained
from bigmodel.training.trained import is_hidden

NORMS = ("norm.weight", "norm.bias")


class Int8:
    """8 bits for hidden matrices, a scale for each output; the rest in `dtype`."""

    about = "8-bit integers with one scale for each output channel (compressed-tensors, W8A16); embeddings and head"
    loading = "`AutoModel...from_pretrained(FOLDER, dtype=...)` of transformers, with the package compressed-tensors"

    def __init__(self, kind: str, settings: ModelSettings, dtype: torch.dtype) -> None:
        self._kind, self._settings, self._dtype = kind, settings, dtype

    def rounded(self, ours: str, weight: Tensor) -> Tensor:
        """What a reader gets for a part of one of our weights."""
        return int8.rounded(weight, self._dtype) if _is_matrix(ours) else weight.to(self._dtype).float()

    def weights(self, plain: Described, names: Names, beside: Sequence[str]) -> Described:
        chosen = [theirs for ours, parts in names.items() if _is_matrix(ours) for theirs, _ in parts]
        return int8.Int8Weights(plain, [name for name in chosen if name not in beside], self._dtype)

    def config(self, names: Names) -> dict[str, Any]:
        heads = [name for ours, parts in names.items() if ours.startswith("head.") for name, _ in parts]
        added = int8.ADDED_HEADS if self._settings.kind == "encoder" else ("lm_head",)
        return int8.quantization_config({name.rpartition(".")[0] for name in heads} | {*added})


class Gguf:
    """One GGUF file of llama.cpp."""

    about = "GGUF Q8_0: 8 bits, one scale for 32 weights"
    loading = "llama.cpp and its kin; `AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=...)` of transformers"

    def __init__(self, kind: str, settings: ModelSettings) -> None:
        self._kind, self._settings = kind, settings

    def rounded(self, ours: str, weight: Tensor) -> Tensor:
        return gguf_file.rounded(weight)

    def write_file(
        self,
        folder: Path,
        weights: Described,
        positions: int,
        ids: Mapping[str, int],
        files: Mapping[str, bytes],
        beside: Sequence[str],
        card: "Card",
    ) -> list[str]:
        """A folder with the file and its card, which appears whole; gives remarks."""
        if folder.exists():
            raise UserError(f"{folder}: exists already; choose another folder, or delete this one")
        partial = folder.parent / f"{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        template = files.get("chat_template.jinja", b"").decode()
        path, tokenizer = partial / f"{folder.name}-Q8_0.gguf", files["tokenizer.json"]
        remarks = gguf_file.write_gguf(
            path, self._kind, self._settings, weights, beside, positions, ids, tokenizer, template
        )
        (partial / "README.md").write_text(card.text(self, remarks))
        os.replace(partial, folder)
        return remarks


Form = Int8 | Gguf


@dataclass(frozen=True)
class Card:
    """README.md of an export."""

    class_name: str
    name: str
    losses: Sequence[str]

    def text(self, form: Form, remarks: Sequence[str] = ()) -> str:
        said = "".join(f"\n- {line}" for line in (*self.losses, *remarks))
        return (
            f"# {self.name}\n\n{self.class_name}, weights as {form.about}.\n\nTo load it: {form.loading}.\n"
            f"{said and said + chr(10)}"
        )


def form_of(name: str, kind: str, settings: Settings, dtype: str, max_bytes: int) -> Form | None:
    """The form of `--quantize`. Raises `UserError` for an unknown one, and for a model that it cannot hold."""
    if not name:
        return None
    if name == "int8":
        if why := int8.NOT_LOADED.get(kind):
            raise UserError(
                f"--quantize int8: transformers with compressed-tensors does not load a quantized {kind} ({why}); "
                "leave --quantize out"
            )
        if settings.model.experts:
            raise UserError("--quantize int8 with model.experts: it is not tested with experts; leave --quantize out")
        return Int8(kind, settings.model, getattr(torch, dtype))
    if name != "q8_0":
        raise UserError(f"--quantize {name}: unknown; use int8 or q8_0")
    if problem := gguf_file.problem_of_gguf(kind, settings.model):
        raise UserError(f"--quantize q8_0: {problem}; {_other(kind, settings.model)}")
    for option, given in (("--dtype", dtype != "float32"), ("--max-gib", max_bytes != MAX_BYTES)):
        if given:
            raise UserError(f"{option} has no effect with --quantize q8_0, one file of fixed types; leave it out")
    gguf_file.require_gguf()
    return Gguf(kind, settings.model)


def _other(kind: str, model: ModelSettings) -> str:
    return "leave it out" if kind in int8.NOT_LOADED or model.experts else "use --quantize int8"


@torch.no_grad()
def losses_of(run_directory: Path, best: bool, kind: str, form: Form) -> list[str]:
    """A line on the loss of a checkpoint on the validation split, before and after."""
    trained = load_trained(run_directory, best)
    validation = make_validation(trained.settings.data, packs_per_micro_batch=1)
    before = validation.run(trained.forward, ALONE)
    names = names_of(kind, trained.settings.model)
    for name, parameter in trained.model.named_parameters():
        rows = [number or len(parameter) for _, number in names.get(name, [("", 0)])]
        parts = [form.rounded(name, part.cpu()) for part in parameter.split(rows)]
        parameter.copy_(torch.cat(parts))
    after = validation.run(trained.forward, ALONE)
    change = after.nats_per_token - before.nats_per_token
    unit = "nats per document" if before.scores else "nats per label"
    return [
        f"validation loss: {before.nats_per_token:.5f} {unit} before, {after.nats_per_token:.5f} after quantization "
        f"({change:+.5f})"
    ]


def _is_matrix(ours: str) -> bool:
    return ours.endswith(".weight") and is_hidden(ours) and not ours.endswith(NORMS)
