#!/usr/bin/env bash
# DeepSpeed's estimate of CPU memory for ZeRO-2 with offload grows with the number of nodes.
# Input: 1e9 parameters, 8 GPUs a node, 1 and 64 nodes, cpu_offload.
# Expected: less memory per node on more nodes: the optimizer states are sharded. The table that DeepSpeed prints says
# "per CPU", and the estimate for ZeRO-3 falls from 27 GB to 0.4 GB.
# Seen: 48 GB on one node, 3,072 GB for each of 64 nodes: what all nodes need together.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet torch==2.13.0 deepspeed==0.19.8 numpy==2.1.3
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

seen = [zero2(10**9, num_gpus_per_node=8, num_nodes=nodes, cpu_offload=True)[0] // 10**9 for nodes in (1, 64)]
stage3 = [zero3(10**9, 10**8, num_gpus_per_node=8, num_nodes=nodes)[0] / 1e9 for nodes in (1, 64)]
print(f"deepspeed {deepspeed.__version__}")
print(f"expected: fewer GB of CPU memory per node on 64 nodes than on 1, as ZeRO-3's: {stage3}")
print(f"seen:     {seen}")
sys.exit(not (seen == [48, 3072] and stage3[1] < stage3[0]))
PYTHON
"$python" finding.py
