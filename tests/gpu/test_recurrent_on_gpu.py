"""Recurrent layers on a GPU: cuDNN gives what the scan gives on a CPU, documents stay apart, peepholes run too.

BIGMODEL_GPU_TESTS=1 python -m pytest tests/gpu
"""

from typing import Any

import pytest
import torch

from bigmodel.checks.leak import isolation
from tests.model.test_recurrent import ALL, batch_for, recurrent_model

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: BIGMODEL_GPU_TESTS=1 python -m pytest tests/gpu"
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("changes", ALL.values(), ids=ALL)
def test_loss_and_gradients_are_those_of_the_cpu(
    changes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = recurrent_model(**changes)
    batch = batch_for(model)
    exact = model.double()(batch)
    expected = torch.autograd.grad(exact, list(model.parameters()))
    model = model.to("cuda", dtype)
    loss = model(batch.to("cuda"))
    found = torch.autograd.grad(loss, list(model.parameters()))
    tolerance = 5e-2 if dtype is torch.bfloat16 else 1e-4
    assert float(loss) == pytest.approx(float(exact), rel=tolerance)
    for mine, wanted in zip(found, expected, strict=True):
        assert float((mine.cpu().double() - wanted).norm()) <= tolerance * float(wanted.norm()) + 1e-6


@pytest.mark.parametrize("changes", ALL.values(), ids=ALL)
def test_editing_a_document_changes_no_bit_of_another_one(changes: dict[str, Any]) -> None:
    model = recurrent_model(**changes)
    findings = isolation(model.to("cuda", torch.bfloat16), batch_for(model).to("cuda"))
    assert [finding for finding in findings if not finding.holds] == []
