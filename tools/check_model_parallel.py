"""What of DeepSpeed's expert and tensor parallelism is exact: one step of a toy on gloo ranks against plain torch.

    python -m tools.check_model_parallel                   # all cases
    python -m tools.check_model_parallel --only experts    # or tensors

A case is a kind, a number of ranks, a degree and a ZeRO stage. `experts`: AutoEP on a toy of two blocks with 4 experts,
2 a token; `tensors`: AutoTP by its default plan on transformers' Llama with 2 layers, 4 heads. Weights are fp32, one
SGD step with rate 1. Labels are uneven over the ranks; each rank's loss is its sum times the data-parallel ranks, over
the labels of all ranks, so that DeepSpeed's mean over ranks is that over labels. Compared with one process:

    forward    largest difference of the logits before the step, over the largest logit
    norm       of the gradient that DeepSpeed reports, relative error; null: it reports none
    update     of logits on a probe by the step: |ours - plain| / |plain|, so weights may lie anywhere
    same, other   a checkpoint of DeepSpeed, loaded by new ranks at the same degree and at degree 1: the same logits?

Exact is below LIMIT. The result is a JSON file.
"""

import faulthandler
import json
import os
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from bigmodel.checks.scratch import scratch_folder
from bigmodel.config.deepspeed_json import VERSION
from bigmodel.training.zero.engine import import_deepspeed
from tests.support.ranks import finish, start_ranks
from tools.torchvision_operators import define_missing_torchvision_operators

LIMIT = 1e-5
VOCABULARY, HIDDEN, EXPERTS, PER_TOKEN, WIDTH, LENGTH = 64, 32, 4, 2, 24, 12
IGNORED = -100
TIMEOUT_SECONDS = 90


@dataclass(frozen=True)
class Case:
    kind: str
    ranks: int
    degree: int
    stage: int

    @property
    def data_ranks(self) -> int:
        return self.ranks if self.kind == "experts" else self.ranks // self.degree


class Gate(nn.Linear):
    """A router by its weight alone."""


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5)


class MixtureOfExperts(nn.Module):
    """Softmax scores, the best PER_TOKEN normalised; (B, S, H) to (B, S, H), every expert on every token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Gate(HIDDEN, EXPERTS, bias=False)
        self.experts = Experts()

    def forward(self, x_BSH: Tensor) -> Tensor:
        scores = torch.softmax(self.router(x_BSH), -1)
        best, chosen = scores.topk(PER_TOKEN, -1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
        gate, up = torch.einsum("bsh,efh->bsef", x_BSH, self.experts.gate_up).chunk(2, -1)
        out = torch.einsum("bsef,ehf->bseh", F.silu(gate) * up, self.experts.down)
        return (out * weights[..., None]).sum(2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.feed_forward = MixtureOfExperts()

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSH = x_BSH + torch.tanh(self.mix(x_BSH)).cumsum(1) / LENGTH
        return x_BSH + self.feed_forward(F.layer_norm(x_BSH, (HIDDEN,)))


class Toy(nn.Module):
    """Two blocks, and an output matrix of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSH = self.embedding(tokens_BS)
        for block in self.blocks:
            x_BSH = block(x_BSH)
        return self.head(x_BSH)


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "experts":
        return Toy()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False, initializer_range=0.15,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def logits_of(model: nn.Module, tokens_BS: Tensor) -> Tensor:
    found = model(tokens_BS)
    return found if isinstance(found, Tensor) else found.logits


def make_batch(data_ranks: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of two sequences for each data-parallel rank; the first rank has few labels."""
    generator = torch.Generator().manual_seed(2)
    tokens_BS, labels_BS = (
        torch.randint(0, VOCABULARY, (2 * data_ranks, LENGTH), generator=generator) for _ in range(2)
    )
    labels_BS[:2, 3:] = IGNORED
    return tokens_BS, labels_BS


def loss_sum(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORED, reduction="sum")


def settings(case: Case) -> dict[str, Any]:
    """The DeepSpeed JSON."""
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "gradient_clipping": 1e9,  # the norm is then computed
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0},
    }
    if case.kind == "experts":
        found["expert_parallel"] = {
            "enabled": True, "autoep_size": case.degree, "moe_layer_pattern": r"blocks\.\d+\.feed_forward",
            "router_pattern": "router", "expert_pattern": "experts", "expert_w1": "gate_up", "expert_w2": "down",
            "expert_w3": None, "top_k": PER_TOKEN, "score_func": "softmax", "score_apply": "post", "route_norm": True,
            "use_grouped_mm": False, "expert_activation": "swiglu", "load_balance_coeff": None,
        }  # fmt: skip
    elif case.degree > 1:
        found["tensor_parallel"] = {"autotp_size": case.degree}
    return found


def make_engine(case: Case) -> Any:
    deepspeed = import_deepspeed()
    deepspeed.init_distributed("gloo")
    model = make_model(case.kind)
    engine, *_ = deepspeed.initialize(model=model, config=settings(case))
    return engine


def train_a_step(case: Case, folder: Path) -> dict[str, Any]:
    """The differences of a step; leaves a checkpoint and its logits of the probe."""
    tokens_BS, labels_BS = make_batch(case.data_ranks)
    count = (labels_BS != IGNORED).sum()
    plain = make_model(case.kind)
    before = logits_of(plain, tokens_BS).detach()
    (loss_sum(logits_of(plain, tokens_BS), labels_BS) / count).backward()
    norm = torch.cat([one.grad.flatten() for one in plain.parameters()]).norm()
    torch.optim.SGD(plain.parameters(), lr=1.0).step()
    step = logits_of(plain, tokens_BS).detach() - before

    engine = make_engine(case)
    place = int(os.environ["RANK"]) // (1 if case.kind == "experts" else case.degree)
    mine = slice(2 * place, 2 * place + 2)
    logits_BSV = logits_of(engine, tokens_BS[mine])
    forward = (logits_BSV.detach() - before[mine]).abs().max() / before.abs().max()
    engine.backward(loss_sum(logits_BSV, labels_BS[mine]) * case.data_ranks / count)
    engine.step()
    after = logits_of(engine, tokens_BS[mine]).detach()
    error = ((after - before[mine]) - step[mine]).norm() / step[mine].norm()
    found_norm = float(engine.get_global_grad_norm() or 0.0)
    engine.save_checkpoint(str(folder / "checkpoint"), tag="one")
    torch.save(logits_of(plain, tokens_BS).detach(), folder / f"plain.{os.environ['RANK']}")
    norm_error = abs(found_norm / float(norm) - 1) if found_norm else None
    return {"forward": float(forward), "norm": norm_error, "update": float(error)}


def load(case: Case, folder: Path, saved: Case) -> dict[str, Any]:
    """The logits after loading, against plain torch after its step."""
    engine = make_engine(case)
    engine.load_checkpoint(str(folder / "checkpoint"), tag="one")
    tokens_BS, _ = make_batch(saved.data_ranks)
    plain = torch.load(folder / "plain.0")
    found = logits_of(engine, tokens_BS[:2]).detach()
    return {"loaded": float((found - plain[:2]).abs().max() / plain.abs().max())}


def enter(function: Callable[..., dict[str, Any]], case: Case, folder: Path, *more: Any) -> None:
    """A rank: its result, or its error, becomes a file."""
    log = os.open(folder / f"log.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS - 5)
    torch.set_num_threads(1)
    define_missing_torchvision_operators()
    try:
        found = function(case, folder, *more)
    except BaseException as error:
        traceback.print_exc()
        words = f"{type(error).__name__}: {error}".splitlines()[0].replace(str(folder), "FOLDER")
        found = {"error": words[:300]}
    (folder / f"result.{os.environ['RANK']}").write_text(json.dumps(found))


def run(function: Callable[..., dict[str, Any]], case: Case, folder: Path, *more: Any) -> dict[str, Any]:
    """The largest value of all ranks, or the first error."""
    for old in folder.glob("result.*"):
        old.unlink()
    codes = finish(start_ranks(case.ranks, enter, function, case, folder, *more), TIMEOUT_SECONDS)
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("result.*"))]
    errors = [one["error"] for one in found if "error" in one]
    if errors or len(found) < case.ranks:
        return {"error": errors[0] if errors else f"exit codes of the ranks: {codes}"}
    return {key: max((one[key] for one in found if one[key] is not None), default=None) for key in found[0]}


def judged(found: dict[str, Any]) -> str:
    if "error" in found:
        return found["error"]
    return "yes" if found["loaded"] < LIMIT else f"wrong logits: {found['loaded']:.1e}"


def row_of(case: Case) -> dict[str, Any]:
    with scratch_folder() as folder:
        row = asdict(case) | run(train_a_step, case, folder)
        if "error" not in row:
            alone = Case(case.kind, case.ranks, 1, case.stage)
            row |= {"same": judged(run(load, case, folder, case)), "other": judged(run(load, alone, folder, case))}
        return row


COLUMNS = ("kind", "ranks", "degree", "stage", "forward", "norm", "update", "same", "other")


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown, as in docs/model-parallel.md."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = (row.get(column, row.get("error") if column == "forward" else None) for column in COLUMNS)
        lines.append(
            "| "
            + " | ".join(f"{one:.0e}" if isinstance(one, float) else str("-" if one is None else one) for one in cells)
            + " |"
        )
    return "\n".join(lines)


# kind, ranks, degree, stage
CASES = [
    Case(kind, ranks, degree, stage)
    for ranks, degree, stages in ((2, 2, (1, 3, 0, 2)), (4, 2, (1, 3)), (4, 4, (1,)))
    for stage in stages
    for kind in ("experts", "tensors")
]


def main(
    only: Annotated[str, typer.Option(help="experts or tensors")] = "",
    out: Annotated[Path, typer.Option(help="the JSON file")] = Path("benchmarks/check_model_parallel.json"),
) -> None:
    """Run the cases, print a row each, and write them after each."""
    head = {"command": "python -m tools.check_model_parallel", "deepspeed": VERSION, "torch": torch.__version__}
    rows = []
    for case in CASES:
        if only in case.kind:
            rows.append(json.dumps(row_of(case)))
            print(rows[-1], flush=True)
            text = ",\n  ".join(rows)
            out.write_text(json.dumps(head)[:-1] + f',\n "rows": [\n  {text}\n ]}}\n')
    print(table_of([json.loads(row) for row in rows]))


if __name__ == "__main__":
    typer.run(main)
