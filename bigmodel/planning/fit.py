"""Whether a run fits its GPUs, in words, with the nearest settings that do where it does not. Imports no torch."""

from typing import Any, NamedTuple

from bigmodel.planning.changes import Choice, bytes_of_gpu, nearest
from bigmodel.planning.context import Context
from bigmodel.planning.memory import unit_of
from bigmodel.sizes import amount


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
        """
        name, unit = unit_of(max(self.needed, self.limit))
        needed, limit = amount(self.needed / unit), amount(self.limit / unit)
        of = f"{needed} of {limit} {name}{f' ({device})' if device else ''}"
        if not self.limit:
            return f"needs {needed} {name}; not compared with a device"
        if self.fits:
            return f"fits: {of}"
        said = "; ".join(f"{choice.words(own)} ({amount(size / unit)})" for choice, size in self.others)
        nothing = "no other ZeRO stage, checkpointing, micro-batch, sequence parallelism or offload does either"
        return f"does not fit: {of}; {f'nearest that do: {said}' if said else nothing}"

    def numbers(self) -> dict[str, Any]:
        others = [choice._asdict() | {"device_bytes": size} for choice, size in self.others]
        return {"fits": self.fits, "device_bytes": self.needed, "limit_bytes": self.limit or None, "nearest": others}


def fit_of(context: Context, limit: int) -> Fit:
    needed = bytes_of_gpu(context)
    return Fit(needed, limit, nearest(context, limit) if 0 < limit < needed else [])
