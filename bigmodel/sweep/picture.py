"""The picture of a sweep: losses over compute, the law, the target's prediction and, once it has run, its loss."""

from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.pictures import BLUE, GREY, INK, ORANGE
from bigmodel.planning.scaling import law_of


def draw(table: dict[str, Any], path: Path) -> None:
    """`table`: of sweep.json. Where rungs differ in tokens per parameter there is no single curve; none is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rungs, target = table["rungs"], table["target"]
    compute = [6.0 * rung["parameters"] * rung["tokens"] for rung in rungs]
    figure, axis = plt.subplots(figsize=(7, 4.5), dpi=130, layout="constrained")
    axis.plot(compute, [rung["loss"] for rung in rungs], "o", color=BLUE, label="rungs")
    found = table.get("prediction")
    if found and [one["of"] for one in table["law"]["terms"]] == ["compute"]:
        law, places = law_of(table["law"]), np.geomspace(min(compute), 1.3 * target["compute"], 100)
        axis.plot(places, [law.loss(1, place / 6) for place in places], color=GREY, label=law.in_words())
    if found:
        low, high = found["interval"] or (found["loss"], found["loss"])
        errors = [[found["loss"] - low], [high - found["loss"]]]
        label = f"predicted, {found['share']:.0%} interval"
        axis.errorbar([target["compute"]], [found["loss"]], errors, fmt="s", color=ORANGE, capsize=4, label=label)
    if "loss" in target:
        axis.plot([target["compute"]], [target["loss"]], "*", markersize=12, color=INK, label="measured")
    axis.set(xscale="log", xlabel="6 N D, FLOPs", ylabel="validation loss, nats per label")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)
