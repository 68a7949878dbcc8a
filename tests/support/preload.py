"""What the server of tests/support/ranks.py imports before it forks ranks: all that a training process would import."""

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # DeepSpeed imports it, and with it torch.compile, late
import torch._dynamo  # noqa: F401  # as does the first torch.optim.Optimizer

import bigmodel.training.loop  # noqa: F401
from bigmodel.data.store.shards import import_mds

import_mds()

gc.freeze()  # DeepSpeed collects garbage at each start: 0.4 s with all these modules to walk through
