"""What the processor can do: whether it multiplies bf16.

In: torch's list of capabilities. Out: where bf16 products are computed. A processor with bf16 units (AVX512_BF16, AMX)
multiplies bf16 2 to 8 times faster than fp32; one without emulates it, about 30 times slower (1.2 against 32 GFLOP/s on
an AVX2 core), so products are then computed in fp32. Guarantee: the choice depends on the kind of processor alone, not
on measured time. Both ways add up in fp32 and round once; the order of the additions differs.
"""

import contextlib
import threading
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor


@cache
def has_bf16_units() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def is_wide(rows: Tensor) -> bool:
    """Whether products of this tensor are computed in fp32: 16-bit types on a CPU without units for them."""
    if rows.device.type != "cpu":
        return False
    return rows.dtype == torch.float16 or (rows.dtype == torch.bfloat16 and not has_bf16_units())


_lock = threading.Lock()
_inside, _before = 0, "none"  # callers inside `bf16_products`, over all threads; the setting before the first


@contextlib.contextmanager
def bf16_products() -> Iterator[None]:
    """Inside, oneDNN rounds fp32 matrices to bf16 to multiply them; sums and results stay fp32. A bf16 matrix that was
    widened to fp32 loses nothing; its product is 1.5 to 3 times faster than in fp32 (AMX).

    The switch is the process's: products of fp32 in another thread are rounded meanwhile, too. Callers may overlap.
    """
    global _inside, _before
    matmul = torch.backends.mkldnn.matmul
    with _lock:
        if not _inside:
            _before = matmul.fp32_precision
        _inside += 1
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                matmul.fp32_precision = _before
