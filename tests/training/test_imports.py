"""The imports of a trainer: nothing of the compiler, and garbage is collected again afterwards."""

import json

from tests.support.interpreted import run_python

PROGRAM = """
import gc, json, sys
from bigmodel.training.imports import frozen, import_engine
with frozen():
    during = gc.isenabled()
    import bigmodel.training.loop
import_engine()
import deepspeed, torch
from deepspeed.runtime import compiler
facts = {
    "during": during, "after": gc.isenabled(), "frozen": gc.get_freeze_count(),
    "imported": [name in sys.modules for name in ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")],
    "compiler": "torch._inductor.compile_fx" in sys.modules, "compile": compiler.compile() is torch.compile,
}
import_engine()
facts["again"] = gc.get_freeze_count() - facts["frozen"]
print(json.dumps(facts))
"""


def test_an_engine_s_imports_are_frozen_once_and_leave_the_compiler_out() -> None:
    facts = json.loads(run_python(["-c", PROGRAM], interpret=False).splitlines()[-1])
    assert facts.pop("frozen") > 100_000
    assert facts == {
        "during": False, "after": True, "imported": [True, True], "compiler": False, "compile": True, "again": 0,
    }  # fmt: skip
