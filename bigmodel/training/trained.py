"""Which parameters are trained: those of `training.freeze` are not, and with [lora] only the adapters are.

In: a model, settings. Out: the same model, with `requires_grad` off where a parameter is frozen. Frozen parameters have
no gradient, no master and no optimizer state; they stay in the precision of the forward pass.
"""

import difflib
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from bigmodel.config.settings import Settings, UserError


def choose_trained(model: nn.Module, settings: Settings) -> None:
    """Freeze parameters. Raises `UserError` for a pattern without a parameter, and if nothing is left to train."""
    parameters = dict(model.named_parameters())
    hits = {pattern: matching(pattern, list(parameters)) for pattern in settings.training.freeze}
    for pattern, names in hits.items():
        if not names:
            raise UserError(f'training.freeze: "{pattern}" matches no parameter; {near(pattern, list(parameters))}')
    frozen = {name for names in hits.values() for name in names}
    if settings.lora.rank:
        # A classification head is new in fine-tuning: it is trained beside adapters, as in peft.
        has_classes = getattr(model.settings, "classification", None)
        frozen |= {
            name for name in parameters if ".lora." not in name and not (has_classes and name.startswith("head."))
        }
    if frozen >= parameters.keys():
        raise UserError(
            f"training.freeze = {settings.training.freeze}: no parameter is left to train; leave out a pattern"
        )
    for name in frozen:
        parameters[name].requires_grad = False


def passes(model: nn.Module) -> float:
    """Passes of a token through the model's own matrices, forward and backward: 3 if all are trained.

    The gradient of a frozen matrix is not computed. Adapters count as passes through the matrices that they belong to.
    Of experts count as many as a token passes.
    """
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    used = [
        id(module.weight) for module in model.modules() if isinstance(getattr(module, "weight", None), nn.Parameter)
    ]
    matrices = {
        name: (_passed(parameter, model), parameter.requires_grad)
        for name, parameter in model.named_parameters()
        if parameter_rank(parameter) >= 2 and (id(parameter) not in embedded or used.count(id(parameter)) > 1)
    }
    if all(is_trained for _, is_trained in matrices.values()):
        return 3
    own = sum(size for name, (size, _) in matrices.items() if ".lora." not in name)
    return sum(size * (2 + is_trained) for size, is_trained in matrices.values()) / own


def active_of(model: nn.Module) -> int:
    """Elements of the parameters that a token passes: of experts its share, of all else everything."""
    return round(sum(_passed(parameter, model) for parameter in model.parameters()))


def _passed(parameter: nn.Parameter, model: nn.Module) -> float:
    """Elements of the parameter that a token passes. Only experts' have three dimensions."""
    experts = getattr(model.settings, "experts", None)
    share = experts.per_token / experts.count if experts and parameter_rank(parameter) == 3 else 1
    return size_of(parameter) * share


def is_hidden(name: str) -> bool:
    """Whether a matrix is neither an embedding nor a head."""
    return not name.removeprefix("encoder.").startswith(("embedding.", "input.", "head.", "relative_bias."))


def size_of(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, which may be partitioned."""
    return math.prod(shape_of(parameter))


def parameter_rank(parameter: nn.Parameter) -> int:
    """Its number of dimensions."""
    return len(shape_of(parameter))


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the whole: ZeRO 3 partitions parameters, ranks share experts."""
    return getattr(parameter, "whole_shape", getattr(parameter, "ds_shape", parameter.shape))


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a pattern means: "embedding" and "blocks.0.*" mean all parameters below."""
    return [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]


def near(pattern: str, names: Sequence[str]) -> str:
    """Names like the pattern, for a message."""
    inner = [name.rpartition(".")[0] for name in names]
    found = difflib.get_close_matches(pattern, dict.fromkeys([*names, *inner]), n=3, cutoff=0.5)
    return f"near names: {', '.join(found or [*names[:3], names[-1]])}"
