"""Masters that hold the values of a Hugging Face folder (`model.from`) exactly.

In: an engine whose weights began with the folder's. DeepSpeed makes the masters from weights in the training precision:
fp32 values of the folder would be rounded to bf16. Costs: one weight at a time.
"""

from contextlib import ExitStack
from functools import lru_cache

from torch import Tensor

from bigmodel.config.settings import Settings
from bigmodel.model.huggingface.start import takes
from bigmodel.training.start import open_weights
from bigmodel.training.zero.engine import Engine


def write_exactly(engine: Engine, settings: Settings) -> None:
    """Write the folder's weights into the masters. Collective."""
    folder = settings.model.start_folder
    assert folder, "model.from is set"
    with ExitStack() as closing:
        weights = open_weights(folder, settings.model, closing)

        @lru_cache(maxsize=1)
        def whole(name: str) -> Tensor:
            return weights.grown(name, engine.shape(name), settings.run.seed).flatten()

        names = [
            name for name in engine.trained() if takes(settings.model, weights, name)
        ]  # frozen ones have no master
        engine.write_weights(names, lambda name, first, numel: whole(name)[first : first + numel])
