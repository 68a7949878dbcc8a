"""Loads a trained model from a run directory into one process, without DeepSpeed."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bigmodel.config.settings import Settings, UserError, settings_from_table
from bigmodel.data.load.batch import Batch
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.model.recurrent.model import build_model
from bigmodel.model.transformer import Transformer
from bigmodel.run_directory import read_json
from bigmodel.training.checkpoint import format as checkpoint


@dataclass(frozen=True)
class Trained:
    """fp32 weights, in evaluation mode, on the GPU if there is one."""

    settings: Settings
    step: int
    model: Transformer
    tokenizer: Tokenizer
    device: torch.device

    @torch.no_grad()
    def forward(self, batch: Batch, output: str) -> Tensor:
        return self.model(batch.to(self.device), output)


def load_trained(run_directory: Path, best: bool = False) -> Trained:
    """The newest or the best good checkpoint of a run, with its adapters merged. `UserError`: there is none."""
    saved = run_directory / "settings.json"
    if not saved.exists():
        raise UserError(
            f"{run_directory}: not a run directory (no settings.json); give the run.directory of a training run"
        )
    settings = settings_from_table(read_json(saved), saved, saved=True)
    found = checkpoint.of_run(run_directory, best)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = checkpoint.read_weights(found)
    model = build_model(settings.model, len(weights["embedding.weight"]))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data.copy_(weights[name])  # a tied output matrix is stored once, as the embedding
    model.eval().to(device)
    store = ShardStore.of_run(settings.data, "validation")
    tokenizer = Tokenizer.load(store.file("tokenizer.json"))
    return Trained(settings, found.state["step"], model, tokenizer, device)
