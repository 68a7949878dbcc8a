#!/usr/bin/env bash
# DeepSpeed's clipping at ZeRO 0 takes the mean of the ranks' norms where ranks hold different experts: too little.
# Input: two gloo ranks, deepspeed.moe.layer.MoE with one expert each, fp32, SGD with rate 1, gradient_clipping 1.
# Expected: the change of all weights by one step has norm 1 at every stage.
# Seen: 1.42 at ZeRO 0, 1.000 at ZeRO 1 and 2. With n ranks of different experts up to sqrt(n) times the limit passes.
# Needs g++: DeepSpeed builds its communication operator once.
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
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "WORLD_SIZE": "2"}
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # ninja, to build the operator
import torch
import torch.multiprocessing

STAGES = (0, 1, 2)


def change(rank: int, stage: int) -> None:
    """Writes the norm by which one step changes this rank's expert."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as marked
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    store = Path(f"store-{stage}").absolute().as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    expert = torch.nn.Linear(8, 8, bias=False)
    layer = deepspeed.moe.layer.MoE(8, expert, num_experts=2, ep_size=2, min_capacity=0, capacity_factor=2.0)
    layer.deepspeed_moe.gate.wg.weight.requires_grad_(False)  # so that the experts are all that is trained
    torch.manual_seed(rank)
    own = [weight for weight in layer.parameters() if weight.requires_grad]
    torch.nn.init.normal_(own[0])
    before = own[0].detach().clone()
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(marked([{"params": own, "name": "experts"}]), lr=1.0)
    engine, *_ = deepspeed.initialize(model=layer, optimizer=optimizer, config=config)
    output, _, _ = engine(torch.randn(16, 8))
    engine.backward(1000 * output.square().sum())
    engine.step()
    torch.save(float((own[0].detach() - before).norm()), f"change-{stage}-{rank}")


if __name__ == "__main__":
    import deepspeed

    norms = []
    for stage in STAGES:
        torch.multiprocessing.spawn(change, (stage,), nprocs=2)
        norms.append(sum(torch.load(f"change-{stage}-{rank}") ** 2 for rank in (0, 1)) ** 0.5)
    print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
    print("expected: a change of norm 1.000 at every stage")
    for stage, norm in zip(STAGES, norms, strict=True):
        print(f"seen:     {norm:.3f} at ZeRO {stage}")
    sys.exit(not (norms[0] > 1.3 and all(abs(norm - 1) < 1e-3 for norm in norms[1:])))
PYTHON
"$python" finding.py 2>&1 | grep -v "process group\|built successfully"
