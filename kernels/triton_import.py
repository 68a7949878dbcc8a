"""Kernels: attention and its rule, and the loss of the output head. They know nothing of the rest of the tree.

Every public function runs on any device: Triton where there is a GPU, plain torch elsewhere. Triton exists for
Linux only, so `triton` and `tl` are taken from here: on other systems they are stand-ins that let the kernel
files be imported; the kernels in them are never launched there.
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
