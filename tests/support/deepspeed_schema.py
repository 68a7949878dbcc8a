"""The keys that the installed DeepSpeed reads from its JSON, found in its own classes and by watching it read."""

import json
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

# Sections that DeepSpeed reads only where they exist; their values turn nothing on.
SECTIONS = (
    "activation_checkpointing", "aio", "autotuning", "autotuning.model_info", "checkpoint", "checkpoint.writer",
    "checkpoint.parallel_write", "comms_logger", "data_efficiency", "data_efficiency.data_sampling",
    "data_efficiency.data_sampling.curriculum_learning", "data_efficiency.data_sampling.dynamic_batching",
    "data_efficiency.data_routing", "data_efficiency.data_routing.random_ltd", "data_types", "flops_profiler",
    "optimizer", "scheduler", "timers", "torch_autocast", "weight_quantization",
)  # fmt: skip
# Attribute of DeepSpeedConfig with a declared class -> section of the JSON.
DECLARED = {
    "zero_config": "zero_optimization",
    "float16_config": "fp16",
    "bfloat16_config": "bf16",
    "monitor_config": "",
    "hybrid_engine": "hybrid_engine",
    "compile_config": "compile",
    "timers_config": "timers.throughput",
    "tensor_parallel_config": "tensor_parallel",
    "weight_quantization_config": "weight_quantization",
}


class Watched(dict):
    """A JSON object that notes the keys that are asked for."""

    def __init__(self, path: str, asked: set[str]) -> None:
        super().__init__()
        self.path, self.asked = path, asked

    def __contains__(self, key: object) -> bool:
        self.asked.add(f"{self.path}.{key}".lstrip("."))
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if key in self else None

    def get(self, key: Any, default: Any = None) -> Any:
        return super().__getitem__(key) if key in self else default

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "Watched":
        return self


def write_schema(path: Path) -> None:
    """Write two lists into a JSON file: the keys that DeepSpeed reads, and those that it has removed."""
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig
    from deepspeed.runtime import config as deepspeed
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    keys: set[str] = set()
    read = deepspeed.DeepSpeedConfig(_watched(keys))
    declared = {name for name, value in vars(read).items() if isinstance(value, DeepSpeedConfigModel)}
    assert declared == set(DECLARED), f"new sections of DeepSpeed: {declared ^ set(DECLARED)}"
    for attribute, section in DECLARED.items():
        keys |= set(_declared(type(getattr(read, attribute)), section))
    keys |= set(_declared(type(read.comms_config.comms_logger), "comms_logger"))
    keys |= {f"pipeline.{name}" for name in read.pipeline}
    keys |= {f"expert_parallel.{field.name}" for field in fields(AutoEPConfig) if field.name[0] != "_"}
    removed = [*deepspeed._REMOVED_TOP_LEVEL_CONFIG_KEYS]
    removed += [f"zero_optimization.{key}" for key in deepspeed._REMOVED_ZERO_CONFIG_KEYS]
    path.write_text(json.dumps([sorted(keys), sorted(removed)]))


def _watched(asked: set[str]) -> Watched:
    whole = Watched("", asked)
    dict.__setitem__(whole, "train_batch_size", 1)
    for section in SECTIONS:
        place: Any = whole
        *above, name = section.split(".")
        for one in above:
            place = dict.__getitem__(place, one)
        dict.__setitem__(place, name, Watched(section, asked))
    return whole


def _declared(model: Any, section: str) -> Iterator[str]:
    """The keys of a declared section, with those of the sections in it; aliases too."""
    for name, field in model.model_fields.items():
        for key in {name, field.alias or name}:
            path = f"{section}.{key}".lstrip(".")
            yield path
            for inner in _models(field.annotation):
                yield from _declared(inner, path)


def _models(annotation: Any) -> Iterator[Any]:
    if hasattr(annotation, "model_fields"):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)
