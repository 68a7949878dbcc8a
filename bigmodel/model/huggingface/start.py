"""Initial weights from a Hugging Face folder (`model.from`).

In: a model with initial weights, and the folder. Out: the model with the folder's weights, in fp32. What the folder
does not have keeps its initial values: multi-token prediction modules, and the head of an encoder, which is its
embedding.

Rows of the vocabulary beyond the folder's are new tokens: each is the mean of the folder's rows plus normal noise of a
hundredth of their deviation, keyed by seed and name (the mean as in Hewitt 2021). Costs: one weight at a time.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from bigmodel.config.settings import ModelSettings, UserError
from bigmodel.config.start_folder import read_config_json
from bigmodel.model.huggingface.folder import FolderWeights
from bigmodel.model.huggingface.weights import check, names_of, without_prefix
from bigmodel.model.init import generator_of

NOISE = 0.01


class StartWeights:
    """The folder's weights under our names, each read when it is asked for."""

    def __init__(self, folder: Path, settings: ModelSettings) -> None:
        config = read_config_json(folder)
        self.folder, self._weights = folder, FolderWeights(folder)
        short = without_prefix(config["model_type"], self._weights)
        self._file_names = {name: stored for stored, name in short.items()}
        self._names = names_of(config["model_type"], settings.model_copy(update={"num_mtp_modules": 0}))
        try:
            check(self._names, settings, {name: self._weights[stored] for stored, name in short.items()})
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> Tensor:
        """fp32. Raises `UserError` for values that are not finite."""
        parts = [self._weights[self._file_names[theirs]].float() for theirs, _ in self._names[name]]
        for tensor, (theirs, _) in zip(parts, self._names[name], strict=True):
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{self.folder}: {theirs} holds NaN or infinite values; fetch the folder again")
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def load_start(
    model: nn.Module, seed: int, whole: Callable[[nn.Parameter], AbstractContextManager] | None = None
) -> None:
    """Fill every parameter that `model.from` has. `whole` gathers a partitioned parameter while it is filled.

    Raises `UserError` for weights that are missing, of another shape or not finite.
    """
    weights = StartWeights(model.settings.start_folder, model.settings)
    for name, parameter in model.named_parameters():
        if name not in weights:
            continue
        with whole(parameter) if whole else contextlib.nullcontext():
            theirs = weights.read(name)
            rows = len(theirs)
            if name.removeprefix("encoder.") in ("embedding.weight", "head.weight") and rows < len(parameter):
                theirs = _grown(theirs, len(parameter), generator_of(seed, name))
            if theirs.shape != parameter.shape:
                raise UserError(
                    f"{weights.folder}: {name} is {tuple(theirs.shape)} there and {tuple(parameter.shape)} in this "
                    "model; config.json and weights are of different models, or the vocabulary is smaller than the "
                    "folder's"
                )
            parameter.copy_(theirs)


def _grown(rows_VH: Tensor, count: int, generator: torch.Generator) -> Tensor:
    mean_H, deviation_H = rows_VH.mean(0), rows_VH.std(0)
    noise = torch.randn((count - len(rows_VH), rows_VH.shape[1]), generator=generator)
    return torch.cat([rows_VH, mean_H + NOISE * deviation_H * noise])
