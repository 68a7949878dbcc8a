#!/usr/bin/env bash
# transformers' routers of DeepSeek-V3, dots1 and GLM-4-MoE choose experts outside of a token's groups.
# Input: a router of 4 experts in 2 groups, with a bias of -1 at each. The same for all, it should change no choice.
# A token has sigmoid scores 0.75, 0.7, 0.6 and 0.55: the first group has the largest sum, and topk_group = 1.
# Expected: experts 0 and 1, those of the first group, as in DeepSeek's own code, which counts others as -infinity.
# Seen: 2 and 3. Others count as 0, which exceeds 0.75 - 1. The weights are scores without bias, so nothing shows it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet torch==2.13.0 numpy==2.1.3 transformers==4.57.6
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import sys

import torch
import transformers
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.dots1.configuration_dots1 import Dots1Config
from transformers.models.dots1.modeling_dots1 import Dots1TopkRouter
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

ROUTERS = {
    "DeepSeek-V3": (DeepseekV3TopkRouter, DeepseekV3Config),
    "dots1": (Dots1TopkRouter, Dots1Config),
    "GLM-4-MoE": (Glm4MoeTopkRouter, Glm4MoeConfig),
}
SIZES = {"hidden_size": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
scores = torch.tensor([0.75, 0.7, 0.6, 0.55])


def chosen(router_class: type, config_class: type, bias: float) -> list[int]:
    router = router_class(config_class(**SIZES))
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
        router.e_score_correction_bias.fill_(bias)
        return sorted(router(torch.logit(scores)[None])[0][0].tolist())


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("expected: [0, 1] at each bias: the same for all experts, it changes no order")
seen = {name: [chosen(*classes, bias) for bias in (0.0, -1.0)] for name, classes in ROUTERS.items()}
for name, found in seen.items():
    print(f"seen:     {name}: bias 0: {found[0]}, bias -1: {found[1]}")
sys.exit(not all(found == [[0, 1], [2, 3]] for found in seen.values()))
PYTHON
"$python" finding.py
