"""Import of Triton, or stand-ins for it. Kernels: masks, attention, loss, experts; they import no other room.

Every public function runs on any device: Triton on a GPU, plain torch elsewhere. Triton exists for Linux only. On
other systems `triton` and `tl` are stand-ins that let the kernel files be imported; no kernel is launched there.
"""

from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:

    def _leave_as_it_is(function: Any = None, **_options: Any) -> Any:
        return function if function is not None else _leave_as_it_is

    triton = SimpleNamespace(jit=_leave_as_it_is)
    tl = SimpleNamespace(constexpr=float)

HAS_TRITON = hasattr(triton, "compile")

# TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly (8 ms per tile): for tests.
INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)
