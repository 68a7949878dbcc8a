"""Initial weights from a Hugging Face folder (`model.from`).

In: a model with initial weights, and the folder. Out: the model with the folder's weights, in fp32. What the folder
does not have keeps its initial values: multi-token prediction modules, the head of an encoder, which is its embedding,
and a classification head.

Rows of the vocabulary beyond the folder's are new tokens: each is the mean of the folder's rows plus normal noise of a
hundredth of their deviation, keyed by seed and name (the mean as in Hewitt 2021). Costs: one weight at a time.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from bigmodel.config.huggingface import read_config
from bigmodel.config.settings import ModelSettings, UserError
from bigmodel.config.start_folder import read_config_json
from bigmodel.model.huggingface.folder import FolderWeights, RenamedWeights
from bigmodel.model.huggingface.weights import as_stored, by_expert, check, names_of, without_prefix
from bigmodel.model.init import generator_of

NOISE = 0.01
OF_TOKENS = ("embedding.weight", "encoder.embedding.weight", "head.weight")


class OpenWeights:
    """Weights under our names, each read when it is asked for."""

    folder: Path

    def __contains__(self, name: str) -> bool:
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        """fp32."""
        raise NotImplementedError

    def grown(self, name: str, shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
        """fp32, of the model's shape, with rows for new tokens. Raises `UserError` for another shape."""
        theirs = self.read(name)
        if name in OF_TOKENS and len(theirs) < shape[0]:
            theirs = _grown(theirs, shape[0], generator_of(seed, name))
        if theirs.shape != shape:
            raise UserError(
                f"{self.folder}: {name} is {tuple(theirs.shape)} there and {tuple(shape)} in this model; leave "
                "model.min_vocabulary out, or set it to the rows there or more"
            )
        return theirs


class StartWeights(OpenWeights):
    """The weights of a Hugging Face folder."""

    def __init__(self, folder: Path, settings: ModelSettings) -> None:
        """Raises `UserError` for weights that are missing, left over, or of another shape than config.json says."""
        config, settings = read_config_json(folder), settings.with_classes_of(None)
        self.folder, self._settings, self._theirs = folder, settings, _weights_of(folder, config["model_type"])
        self._names = names_of(config["model_type"], settings.model_copy(update={"num_mtp_modules": 0}))
        try:
            check(self._names, settings, self._theirs, config.get("vocab_size") or 0)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> Tensor:
        """fp32. Raises `UserError` for values that are not finite."""
        parts = self._names[name]
        if len(parts) == 1:
            return by_expert(name, self._read(parts[0][0]), self._settings)
        rows_NH, first = None, 0
        for theirs, count in parts:
            part = self._read(theirs)
            if rows_NH is None:
                rows_NH = part.new_empty(sum(rows for _, rows in parts), *part.shape[1:])
            rows_NH[first : first + count] = part
            first += count
        assert rows_NH is not None
        return by_expert(name, rows_NH, self._settings)

    def _read(self, theirs: str) -> Tensor:
        weight = self._theirs[theirs].float()
        if not all(bool(end.isfinite()) for end in weight.aminmax()):  # without a copy
            raise UserError(f"{self.folder}: {theirs} holds NaN or infinite values; fetch the folder again")
        return weight


def takes(settings: ModelSettings, weights: OpenWeights, name: str) -> bool:
    """Whether a parameter begins with the weights: a classification head is new."""
    return name in weights and not (settings.classification and name.startswith("head."))


def read_settings(folder: Path) -> ModelSettings:
    """Of config.json, and of the weights where these decide. Raises `UserError` for what our model lacks."""
    config = read_config_json(folder)
    try:
        settings = read_config(config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return as_stored(config["model_type"], settings, _weights_of(folder, config["model_type"]))


def _weights_of(folder: Path, kind: str) -> RenamedWeights:
    weights = FolderWeights(folder)
    return RenamedWeights(weights, {name: stored for stored, name in without_prefix(kind, weights).items()})


@torch.no_grad()
def load_start(
    model: nn.Module, seed: int, whole: Callable[[nn.Parameter], AbstractContextManager] | None = None
) -> None:
    """Fill every parameter that `model.from` has. `whole` gathers a partitioned parameter while it is filled.

    Raises `UserError` for weights that are missing, of another shape or not finite.
    """
    fill(model, StartWeights(model.settings.start_folder, model.settings), seed, whole)


@torch.no_grad()
def fill(
    model: nn.Module,
    weights: OpenWeights,
    seed: int,
    whole: Callable[[nn.Parameter], AbstractContextManager] | None = None,
) -> None:
    """`load_start` from weights that are open."""
    for name, parameter in model.named_parameters():
        if not takes(model.settings, weights, name):
            continue
        with whole(parameter) if whole else contextlib.nullcontext():
            parameter.copy_(weights.grown(name, parameter.shape, seed))
    for name, buffer in model.named_buffers():  # the biases of experts are part of the model
        if name in weights and name.endswith(".bias"):
            buffer.copy_(weights.read(name))


def _grown(rows_VH: Tensor, count: int, generator: torch.Generator) -> Tensor:
    mean_H, deviation_H = rows_VH.mean(0), rows_VH.std(0)
    noise_VH = torch.randn((count - len(rows_VH), rows_VH.shape[1]), generator=generator)
    return torch.cat([rows_VH, mean_H + NOISE * deviation_H * noise_VH])
