"""Whether a run fits its GPUs, in words, with the nearest settings that do where it does not. Imports no torch."""

from typing import Any, NamedTuple

from bigmodel.planning.changes import Choice, bytes_of_gpu, nearest
from bigmodel.planning.context import Context
from bigmodel.planning.memory import unit_of
from bigmodel.sizes import amount

# Less than this share of a device left over is said: what a plan estimates is less certain than that. NCCL's first
# communicator alone is reported as 0.7 and as 1.6 GB (`bigmodel.planning.memory`), 1% of 80 GB.
MARGIN = 0.02
SPARE = f", with less than {MARGIN:.0%} to spare"


class Fit(NamedTuple):
    """`limit`: bytes of a device, 0 if it is not known. `others`: what would fit, if it does not, with its bytes."""

    needed: int
    limit: int
    others: list[tuple[Choice, int]]

    @property
    def fits(self) -> bool | None:
        return self.needed <= self.limit if self.limit else None

    def words(self, own: Choice, device: str = "") -> str:
        """
        >>> own, gib = Choice(1, "none", 4, 1, False), 2**30
        >>> Fit(61 * gib, 80 * gib, []).words(own, "H100 SXM")
        'fits: 61.00 of 80.00 GiB (H100 SXM)'
        >>> Fit(92 * gib, 80 * gib, [(own._replace(stage=2), 71 * gib)]).words(own)
        'does not fit: 92.00 of 80.00 GiB; nearest that do: ZeRO 2 (71.00)'
        >>> Fit(79 * gib, 80 * gib, []).words(own)
        'fits: 79.00 of 80.00 GiB, with less than 2% to spare'
        """
        name, unit = unit_of(max(self.needed, self.limit))
        needed, limit = amount(self.needed / unit), amount(self.limit / unit)
        of = f"{needed} of {limit} {name}{f' ({device})' if device else ''}"
        if not self.limit:
            return f"needs {needed} {name}; not compared with a device"
        if self.fits:
            return f"fits: {of}{SPARE if is_tight(self.needed, self.limit) else ''}"
        said = "; ".join(
            f"{choice.words(own)} ({amount(size / unit)}{SPARE if is_tight(size, self.limit) else ''})"
            for choice, size in self.others
        )
        nothing = "no other ZeRO stage, checkpointing, micro-batch, sequence parallelism or offload does either"
        return f"does not fit: {of}; {f'nearest that do: {said}' if said else nothing}"

    def numbers(self) -> dict[str, Any]:
        others = [choice._asdict() | {"device_bytes": size} for choice, size in self.others]
        return {
            "fits": self.fits,
            "is_tight": is_tight(self.needed, self.limit),
            "device_bytes": self.needed,
            "limit_bytes": self.limit or None,
            "nearest": others,
        }


def is_tight(needed: int, limit: int) -> bool:
    """Whether it fits with less than the margin to spare."""
    return (1 - MARGIN) * limit < needed <= limit


def fit_of(context: Context, limit: int) -> Fit:
    needed = bytes_of_gpu(context)
    return Fit(needed, limit, nearest(context, limit) if 0 < limit < needed else [])
