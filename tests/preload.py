"""What the server of tests/ranks.py imports before it forks ranks."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401

import bigmodel.training.loop  # noqa: F401
