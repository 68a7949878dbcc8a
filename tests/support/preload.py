"""Imports of the server of tests/support/ranks.py before it forks ranks: all imports of a training process."""

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # DeepSpeed imports it late, and torch.compile with it
import torch._dynamo  # noqa: F401  # as does the first torch.optim.Optimizer

import bigmodel.training.loop  # noqa: F401
from bigmodel.data.store.shards import import_mds

import_mds()

gc.freeze()  # DeepSpeed collects garbage at each start: 0.4 s over all these modules
