"""Training steps of one contender of `tools.bench_step`, in a process of its own.

In: the name of a contender and a case; then a line on stdin for each step. Out: a line of JSON for each step: CPU
seconds of the process, loss, and for bigmodel the CPU seconds outside forward, backward and optimizer. All contenders
train on the same packs; they are made from the case's seed, and depend on nothing else.

Letters in tensor names: B packs, T positions of a pack, H hidden_size, N heads, K channels of a head.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from bigmodel.checks.scratch import scratch_folder
from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import DataSettings, Settings
from bigmodel.data.load.batch import Batch, build_batch, make_dropout_seeds
from bigmodel.data.plan.packing import best_fit_decreasing
from bigmodel.data.plan.shuffle import Chunk
from bigmodel.distributed.world import end_world, start_world
from bigmodel.model.init import init_weights
from bigmodel.model.recurrent.model import build_model
from bigmodel.training.zero.engine import Engine

MEDIAN_LENGTH, SPREAD = 150, 1.0  # of the lognormal lengths of documents
NUM_STEPS = 8  # different batches; then they repeat


class Case(NamedTuple):
    """A model and the packs of its steps."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocabulary: int
    sequence_length: int
    packs: int
    max_documents: int = 256

    @property
    def model(self) -> dict[str, Any]:
        sizes = self._asdict()
        return {name: sizes[name] for name in list(sizes)[:5]} | {"tied_embeddings": True}


CASES = {
    "quick": Case(1, 32, 2, 1, 64, 64, 64, 2),
    "tiny": Case(3, 128, 4, 2, 384, 1024, 512, 2, 64),
    "128 wide": Case(4, 128, 4, 2, 384, 2048, 512, 8),
    "128 wide, context 2,048": Case(4, 128, 4, 2, 384, 2048, 2048, 2),
    "512 wide": Case(8, 512, 8, 4, 1280, 8192, 512, 4),
}

# Four sizes for `tools.bench_plan`: the first three are measured, the last one is predicted.
LADDER = {
    "ladder 64": Case(2, 64, 4, 2, 192, 2048, 512, 4),
    "ladder 128": Case(3, 128, 4, 2, 384, 2048, 512, 4),
    "ladder 192": Case(4, 192, 6, 2, 576, 2048, 512, 4),
    "ladder 320": Case(6, 320, 8, 4, 960, 2048, 512, 4),
}


def batches(case: Case) -> list[list[Batch]]:
    """The packs of each step, a batch of one pack each."""
    generator = np.random.default_rng(1)
    size, wanted = case.sequence_length, NUM_STEPS * case.packs
    count = 4 * wanted * size // MEDIAN_LENGTH
    lengths = generator.lognormal(np.log(MEDIAN_LENGTH), SPREAD, count).astype(int).clip(2, size)
    packing = best_fit_decreasing(lengths, size, case.max_documents)
    packs = [packing.packs[number] for number in generator.permutation(len(packing.packs))[:wanted]]
    texts = [generator.integers(3, case.vocabulary, length + 1) for length in lengths.tolist()]
    data = DataSettings(max_document_length=size, sequence_length=size, max_documents=case.max_documents)
    seeds = make_dropout_seeds(1, 0, [0], size)

    def one(pack: list[int]) -> Batch:
        chunks = tuple(Chunk(0, 0, row, 0, int(lengths[row]), 0) for row in pack)
        return build_batch([chunks], lambda chunk: texts[chunk.row], data, seeds)

    built = [one(pack) for pack in packs]
    return [built[first : first + case.packs] for first in range(0, wanted, case.packs)]


def joined(packs: list[Batch]) -> Batch:
    """One micro-batch of several."""
    offsets, ends = 0, [torch.zeros(1, dtype=torch.int32)]
    documents = sum(len(pack.cu_seqlens) - 1 for pack in packs)
    for pack in packs:
        ends.append(pack.cu_seqlens[1:][pack.cu_seqlens.diff() > 0] + offsets)
        offsets += len(pack.tokens)
    cu_seqlens = torch.cat(ends)
    spare = torch.full((documents + 1 - len(cu_seqlens),), offsets, dtype=torch.int32)
    rows = {name: torch.cat([getattr(pack, name) for pack in packs]) for name in ROWS}
    sums = {name: sum(getattr(pack, name) for pack in packs) for name in COUNTS}
    return Batch(**rows, cu_seqlens=torch.cat([cu_seqlens, spare]), **sums)


ROWS = ("tokens", "labels", "positions", "dropout_seeds")
COUNTS = ("num_tokens", "num_labels", "num_documents")

# ---- bigmodel -----------------------------------------------------------------------------------------------------


class Inside:
    """CPU seconds in forward, backward and optimizer, by hooks around them."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds, self._began = 0.0, 0.0
        model.register_forward_pre_hook(self.begin)
        model.register_forward_hook(self.end)
        register_optimizer_step_pre_hook(self.begin)
        register_optimizer_step_post_hook(self.end)
        backward = torch.autograd.backward

        def timed(*arguments: Any, **named: Any) -> None:
            self.begin()
            backward(*arguments, **named)
            self.end()

        torch.autograd.backward = timed

    def begin(self, *_: Any) -> None:
        self._began = time.process_time()

    def end(self, *_: Any) -> None:
        self.seconds += time.process_time() - self._began


def bigmodel_steps(case: Case, precision: str = "fp32", compiled: bool = False) -> Iterator[dict[str, float]]:
    """Steps of the engine under ZeRO 1, on this rank's share of the packs; with the sums and the norm of the loop."""
    world = start_world()
    mine = slice(world.rank * case.packs // world.size, (world.rank + 1) * case.packs // world.size)
    with scratch_folder() as folder:
        path = folder / "zero1.json"
        count = case.packs // world.size
        path.write_text(json.dumps({"train_micro_batch_size_per_gpu": count, "zero_optimization": {"stage": 1}}))
        training = {"precision": precision, "compile": compiled, "global_batch_size": case.packs}
        table = {"model": case.model, "training": {**training, "steps": 1000, "deepspeed": str(path)}}
        effective, settings = resolve_deepspeed(Settings.model_validate(table), world.size)
    model = build_model(settings.model, case.vocabulary)
    init_weights(model, 1)
    inside = Inside(model)
    engine = Engine(model, settings, effective, world)
    steps = [(joined(packs[mine]), sum(pack.num_labels for pack in packs)) for packs in batches(case)]
    try:
        while True:
            for batch, num_labels in steps:
                before, began = inside.seconds, time.process_time()
                (loss,) = world.sum_([float(engine.micro_batch(batch, num_labels, last=True))])
                engine.gradient_norm()
                engine.update(1e-3)
                outside = time.process_time() - began - (inside.seconds - before)
                yield {"loss": loss / num_labels, "outside": outside}
    finally:
        end_world()


# ---- plain torch --------------------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
        self.channels = case.hidden_size // case.num_heads
        width, inner = case.hidden_size, case.intermediate_size
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.query_key_value = nn.Linear(width, sum(self.heads) * self.channels, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTH: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        rows = self.query_key_value(self.norms[0](x_BTH)).unflatten(-1, (sum(self.heads), self.channels))
        q, k, v = rows.transpose(1, 2).split(self.heads, 1)

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)

        out = F.scaled_dot_product_attention(
            rotate(q), rotate(k), v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        x_BTH = x_BTH + self.output(out.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norms[1](x_BTH)).chunk(2, -1)
        return x_BTH + self.down(F.silu(gate) * up)


class Plain(nn.Module):
    """The same model in rows of packs, (B, T)."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embedding = nn.Embedding(case.vocabulary, case.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(case) for _ in range(case.num_layers))
        self.norm = nn.RMSNorm(case.hidden_size, eps=1e-5)
        channels = case.hidden_size // case.num_heads
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(0, channels, 2) / channels))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        angles = positions[:, None, :, None] * self.frequencies
        x_BTH, cos, sin = self.embedding(tokens), angles.cos(), angles.sin()
        for block in self.blocks:
            x_BTH = block(x_BTH, cos, sin, mask)
        logits = F.linear(self.norm(x_BTH), self.embedding.weight).flatten(0, 1).float()
        return F.cross_entropy(logits, labels.flatten(), ignore_index=-100)


def plain_inputs(case: Case, packs: list[Batch], masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """tokens, labels, positions and mask. Not masked: concatenated and cut, as if documents were one text."""
    tokens, labels, positions = (torch.stack([getattr(pack, name) for pack in packs]) for name in ROWS[:3])
    if not masked:
        return tokens, tokens.roll(-1, 1), torch.arange(case.sequence_length)[None], None
    row = torch.arange(case.sequence_length)
    document = torch.stack([torch.searchsorted(pack.cu_seqlens.long(), row, right=True) for pack in packs])
    sees = (document[:, :, None] == document[:, None, :]) & (row <= row[:, None])
    return tokens, labels, positions, sees[:, None]


def plain_steps(case: Case, masked: bool, bf16: bool = False) -> Iterator[dict[str, float]]:
    torch.manual_seed(1)
    model = Plain(case)
    decayed, others = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    steps = batches(case)
    while True:
        for packs in steps:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(*plain_inputs(case, packs, masked))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield {"loss": float(loss.detach())}


# ---- Hugging Face -------------------------------------------------------------------------------------------------


def huggingface_train(case: Case, done: Callable[[], None], bf16: bool = False) -> None:
    """Trainer with LlamaForCausalLM on packs without masks; `done` is called after each step."""
    from tools.torchvision_operators import define_missing_torchvision_operators

    define_missing_torchvision_operators()
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class AfterStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            done()

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=case.vocabulary, hidden_size=case.hidden_size, intermediate_size=case.intermediate_size,
            num_hidden_layers=case.num_layers, num_attention_heads=case.num_heads,
            num_key_value_heads=case.num_kv_heads, max_position_embeddings=case.sequence_length,
            tie_word_embeddings=True, attn_implementation="sdpa", use_cache=False,
        )
    )  # fmt: skip
    rows = [torch.stack([pack.tokens for pack in packs]) for packs in batches(case)]
    repeated = [{"input_ids": row, "labels": row} for _ in range(200) for row in rows]
    with scratch_folder() as folder:
        arguments = TrainingArguments(
            str(folder), max_steps=len(repeated), per_device_train_batch_size=1, use_cpu=True, report_to=[],
            save_strategy="no", logging_steps=10**6, learning_rate=1e-3, adam_beta2=0.95, weight_decay=0.1,
            max_grad_norm=1.0, lr_scheduler_type="constant", disable_tqdm=True, optim="adamw_torch_fused", bf16=bf16,
            remove_unused_columns=False,
        )  # fmt: skip
        Trainer(
            model=model, args=arguments, train_dataset=repeated, data_collator=lambda taken: taken[0],
            callbacks=[AfterStep()],
        ).train()  # fmt: skip


STEPS: dict[str, Callable[[Case], Iterator[dict[str, float]]]] = {
    "bigmodel": bigmodel_steps,
    "bigmodel bf16": lambda case: bigmodel_steps(case, "bf16"),
    "bigmodel compiled": lambda case: bigmodel_steps(case, compiled=True),
    "dense mask": lambda case: plain_steps(case, masked=True),
    "dense mask, autocast bf16": lambda case: plain_steps(case, masked=True, bf16=True),
    "concatenated": lambda case: plain_steps(case, masked=False),
}
HUGGINGFACE = "Hugging Face Trainer"


def main() -> None:
    contender, case = sys.argv[1], (CASES | LADDER)[sys.argv[2]]
    torch.set_num_threads(1)
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print
    began = [0.0]

    def answer(**found: float) -> None:
        print(json.dumps({"cpu": time.process_time() - began[0], **found}), file=out, flush=True)
        if not sys.stdin.readline():
            raise SystemExit
        began[0] = time.process_time()

    if contender == HUGGINGFACE:
        huggingface_train(case, answer)
        return
    for found in STEPS[contender](case):
        answer(**found)


if __name__ == "__main__":
    main()
