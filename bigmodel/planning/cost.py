"""Days, GPU hours, money and energy of a planned run. Imports no torch.

In: a context, its `StepTime`, the part on saves and failures. Out: a part of the plan. Energy is that of GPUs at their
thermal design power for the whole time, as in Llama's model cards, so it is a bound; hosts and network are a factor.
"""

from typing import TYPE_CHECKING

from bigmodel.planning.part import Part, Row
from bigmodel.planning.step_time import StepTime
from bigmodel.sizes import amount, short_duration

if TYPE_CHECKING:
    from bigmodel.planning.context import Context

JOULES_PER_MWH = 3.6e9
# A DGX H100 takes up to 10.2 kW (its user guide); its 8 GPUs are 5.6 kW of them. Cooling is not in it.
WHOLE_NODE = 10.2 / 5.6


def cost_part(context: "Context", found: StepTime, reliability: Part) -> Part:
    hardware, training = found.hardware, context.settings.training
    goodput = float(reliability.numbers["goodput_ratio"])
    ramped = ", the batch ramp counted" if training.batch_ramp else ""
    budget = Row("tokens", f"{found.run_tokens:,}", f"{training.steps:,} steps{ramped}")
    if not goodput:
        reason = "failures come faster than checkpoints are saved: save more often, or use fewer GPUs"
        return Part("cost", [budget, Row("time", "no end", reason)], {"tokens": found.run_tokens, "seconds": None})
    seconds = found.run_seconds / goodput
    gpu_hours = seconds / 3600 * context.ranks
    joules = seconds * context.ranks * hardware.watts
    rows = [
        budget,
        Row(
            "without interruption",
            short_duration(found.run_seconds),
            f"of it {short_duration(found.evaluation_seconds)} evaluation",
        ),
        Row("time", f"{amount(seconds / 86400)} days", f"goodput {goodput:.1%}"),
        Row("GPU hours", f"{gpu_hours:,.0f}" if gpu_hours >= 100 else amount(gpu_hours), f"{context.ranks:,} GPUs"),
        _money(gpu_hours, hardware.price_per_hour),
        Row("energy of the GPUs", f"{joules / JOULES_PER_MWH:,.3g} MWh", f"{hardware.watts:,.0f} W each, all the time"),
        Row(
            "energy of the nodes", f"{joules * WHOLE_NODE / JOULES_PER_MWH:,.3g} MWh", f"x {WHOLE_NODE:.2f}: a DGX H100"
        ),
    ]
    numbers = {
        "tokens": found.run_tokens,
        "uninterrupted_seconds": found.run_seconds,
        "seconds": seconds,
        "gpu_hours": gpu_hours,
        "money": gpu_hours * hardware.price_per_hour or None,
        "gpu_joules": joules,
        "node_joules": joules * WHOLE_NODE,
    }
    return Part("cost", rows, numbers)


def _money(gpu_hours: float, price: float) -> Row:
    if not price:
        return Row("money", "-", "set hardware.price_per_gpu_hour in the cluster file")
    return Row("money", f"{gpu_hours * price:,.0f}", f"{price:,.2f} per GPU hour, in the currency of the cluster file")
