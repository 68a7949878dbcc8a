"""What `bigmodel serve` and `bigmodel generate` write with: a model with its tokenizer, context and chat template.

In: a run file or run directory with a checkpoint, or a Hugging Face folder. Raises `UserError` for a folder that is
neither, a model that cannot generate, weights that are not finite, and a tokenizer of another model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bigmodel.config.huggingface import read_config
from bigmodel.config.settings import DataSettings, UserError, load_settings
from bigmodel.config.start_folder import read_config_json
from bigmodel.data.store.chat_template import TEMPLATE_FILE, end_of_turn, read_chat_template, render_chat
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.generation.far_labels import target_ahead_of
from bigmodel.model.huggingface.start import load_start
from bigmodel.model.transformer import Transformer
from bigmodel.training.load_model import Trained, load_trained

T5_SOURCE = 512  # tokens that T5 was trained to read; config.json does not bound them


@dataclass(frozen=True)
class Served:
    """context: positions of the decoder, the prompt included. max_source: tokens that an encoder reads, 0 without one.
    chat_template: Jinja, None without one. end_of_turn: the token that ends an answer in a chat, if it is known."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    device: torch.device
    context: int
    max_source: int
    chat_template: str | None
    end_of_turn: int | None = None
    target_ahead: int = 1

    @property
    def has_source(self) -> bool:
        return self.model.settings.has_source

    @property
    def shares_positions(self) -> bool:
        """Whether source and target lie in one cache (mixed attention)."""
        return self.has_source and self.model.settings.source_attention == "mixed"

    @property
    def positions(self) -> int:
        """Of one sequence in the engine's cache."""
        return self.context + self.max_source if self.shares_positions else max(self.context, self.max_source)

    def render(self, messages: list[dict[str, Any]]) -> list[int]:
        """Ids of a chat, up to where the assistant speaks. Raises `UserError` for what the template refuses."""
        assert self.chat_template is not None
        return render_chat(self.chat_template, messages, self.tokenizer, add_generation_prompt=True)[0]


def load_served(
    location: Path, overrides: Sequence[str] = (), name: str = "", max_positions: int = 0, best: bool = False
) -> Served:
    """`location`: a run file, a run directory, or a Hugging Face folder. name: empty: the folder's. max_positions: of
    prompt and answer, and of a source; 0: the model's context. best: of a run, the checkpoint of checkpoint.keep_best.
    """
    if location.suffix == ".toml":
        location = load_settings(location, overrides).run.directory
    elif overrides:
        raise UserError(f"--set {overrides[0]}: needs a run file, and {location} is a folder; leave --set out")
    is_run = (location / "settings.json").exists()
    if not is_run and not (location / "config.json").exists():
        raise UserError(
            f"{location}: neither a run directory (settings.json) nor a Hugging Face folder (config.json); name a run "
            "file, the run.directory of a training run, or such a folder"
        )
    if best and not is_run:
        raise UserError(f"--best: {location} is a Hugging Face folder, which has no checkpoints; leave --best out")
    name = name or location.resolve().name
    served = of_run(load_trained(location, best), name) if is_run else _of_folder(location, name)
    if served.chat_template is not None:
        served = replace(served, end_of_turn=end_of_turn(served.chat_template, served.tokenizer))
    if not max_positions:
        return served
    return replace(served, context=max_positions, max_source=max_positions if served.has_source else 0)


def of_run(trained: Trained, name: str) -> Served:
    settings = trained.settings
    return Served(
        name=name,
        model=trained.model,
        tokenizer=trained.tokenizer,
        device=trained.device,
        context=settings.model.max_positions or settings.data.max_document_length,
        max_source=settings.data.max_source_length or settings.data.source_sequence_length,
        chat_template=_template_of_data(settings.data),
        target_ahead=target_ahead_of(settings),
    )


def _template_of_data(settings: DataSettings) -> str | None:
    """That of the prepared folder, fetched from its store if need be."""
    store = ShardStore.of_run(settings, "validation")
    if TEMPLATE_FILE in store.manifest.files:
        store.file(TEMPLATE_FILE)
    return read_chat_template(store.directory)


def _of_folder(folder: Path, name: str) -> Served:
    config = read_config_json(folder)
    settings = read_config(config)
    tokenizer = Tokenizer.load(folder)
    rows = config["vocab_size"]
    if tokenizer.vocabulary > rows:
        raise UserError(
            f"{folder}: tokenizer.json has {tokenizer.vocabulary} ids and vocab_size of config.json is {rows}; one of "
            "them is of another model: fetch the folder again"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Transformer(settings.model_copy(update={"from": folder}), rows)
    load_start(model, seed=0)
    model.eval().to(device)
    limit = config.get("max_position_embeddings") or config.get("n_positions") or T5_SOURCE
    has_source = settings.kind == "encoder_decoder"
    return Served(name, model, tokenizer, device, limit, limit if has_source else 0, read_chat_template(folder))
