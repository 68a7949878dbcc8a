"""The model of a run at its start: initial weights, or those of `model.from` and `lora.from`; and what is trained.

In: settings. Out: the model. `model.from` is a Hugging Face folder or the directory of another run, whose newest good
checkpoint is read, with its adapters merged. Costs: one weight at a time.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from bigmodel.config.settings import ModelSettings, Settings, UserError
from bigmodel.config.start_folder import is_run
from bigmodel.exchange.adapter import load_adapter
from bigmodel.model.huggingface.start import OpenWeights, StartWeights, fill
from bigmodel.model.init import init_weights
from bigmodel.model.lora import add_adapters
from bigmodel.model.recurrent.model import build_model
from bigmodel.model.transformer import Transformer
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.token_vectors import TokenVectors
from bigmodel.training.trained import choose_trained
from bigmodel.training.zero.engine import creation
from bigmodel.training.zero.tensor_parallel import build_parts

Whole = Callable[[nn.Parameter], AbstractContextManager]


class RunWeights(OpenWeights):
    """The weights of a run's newest good checkpoint, each read when it is asked for."""

    def __init__(self, run_directory: Path, closing: ExitStack) -> None:
        found = checkpoint.newest(run_directory / "checkpoints")
        if found is None:
            raise UserError(f"model.from = {run_directory}: this run has no checkpoint yet")
        self.folder, self._source = run_directory, closing.enter_context(checkpoint.weights(found))

    def __contains__(self, name: str) -> bool:
        return name in self._source.shapes

    def read(self, name: str) -> Tensor:
        shape = self._source.shape(name)
        return self._source.read(name, 0, math.prod(shape)).view(shape)


def new_model(
    settings: Settings, effective: dict[str, Any], vocabulary: int, begins: bool, vectors: TokenVectors | None = None
) -> Transformer:
    """begins: nothing will be resumed, so that `model.from` and `lora.from` have a part in it. vectors: of tokens, that
    the embeddings begin with.

    Raises `UserError` for folders that do not fit the settings, and for patterns that fit no parameter.
    """
    model, whole = empty_model(settings, effective, vocabulary)
    init_weights(model, settings.run.seed, whole)
    if vectors:
        vectors.fill(model, settings.run.seed, whole)
    if begins and settings.model.start_folder:
        load_weights(model, settings.model.start_folder, settings.run.seed, whole)
    if begins and settings.lora.start_folder:
        load_adapter(model, settings, whole)
    choose_trained(model, settings)
    return model


def empty_model(settings: Settings, effective: dict[str, Any], vocabulary: int) -> tuple[Transformer, Whole]:
    """The model without values, partitioned or cut where ranks share it, and a context manager that makes one parameter
    whole while it is filled, with equal values on every rank."""
    training = settings.training

    def build() -> Transformer:
        model = build_model(settings.model, vocabulary, training.z_loss, training.label_smoothing)
        add_adapters(model, settings.lora)
        return model

    if training.tensor_parallel_ranks > 1 and effective["zero_optimization"]["stage"] != 3:
        return build_parts(build, training.tensor_parallel_ranks, dist.get_rank())
    with creation(effective, training.expert_parallel_ranks) as whole:
        return build(), whole


def load_weights(model: Transformer, folder: Path, seed: int, whole: Whole | None = None) -> None:
    """Fill every parameter that the folder has."""
    with ExitStack() as closing:
        fill(model, open_weights(folder, model.settings, closing), seed, whole)


def open_weights(folder: Path, settings: ModelSettings, closing: ExitStack) -> OpenWeights:
    """The weights of `model.from`, open until `closing` ends."""
    return RunWeights(folder, closing) if is_run(folder) else StartWeights(folder, settings)
