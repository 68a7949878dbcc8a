"""Checks that train short runs: their bounds."""

import pytest

from bigmodel.checks.runs import slack_of_loss
from bigmodel.config.settings import TrainingSettings


@pytest.mark.parametrize("kind", ["sequence", "expert", "tensor"])
def test_a_loss_below_fp32_may_be_rounded_otherwise_on_ranks_that_share(kind: str) -> None:
    shared = {f"{kind}_parallel_ranks": 2}
    assert slack_of_loss(TrainingSettings(precision="bf16", **shared)) == 1000
    assert slack_of_loss(TrainingSettings(precision="fp32", **shared)) == 1
    assert slack_of_loss(TrainingSettings(precision="bf16")) == 1
