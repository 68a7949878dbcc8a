"""The imports of a trainer, which are most of the processor time of its start.

In: nothing. Out: modules. Guarantees: the collector of garbage does not run meanwhile and never looks at their objects
(DeepSpeed collects six times at a start, each time over all objects of 3,000 modules); the backend of torch.compile is
not imported for a run that compiles nothing (findings/deepspeed_initialize_imports_inductor.sh).
"""

import contextlib
import gc
import io
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

# torch imports it when an optimizer is made or an operator of ours is called; here, so that it is frozen.
DYNAMO = "torch._dynamo"
COMPILER = "deepspeed.runtime.compiler"
MUON = "deepspeed.runtime.zero.muon.muon_optimizer"


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Objects made before the end of this block are never collected: for imports alone."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_engine() -> None:
    """Import DeepSpeed and what it imports to make an engine; nothing if that is done."""
    if MUON in sys.modules:
        return
    from bigmodel.training.zero.engine import import_deepspeed

    with frozen(), contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints at its import
        import_deepspeed()
        with contextlib.suppress(ImportError, AttributeError):  # another version's
            _import_muon()
            import_module(DYNAMO)


def _import_muon() -> None:
    """DeepSpeed compares an optimizer's type with its Muon's. That one, whose functions would be compiled, no run uses:
    `optimizer.kind = "muon"` is bigmodel's own."""
    compiler: Any = import_module(COMPILER)
    compile_now, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import_module(MUON)
    finally:
        compiler.compile = compile_now
