"""FLOPs by formula equal what torch counts, for every kind of model; peaks and phases are what they say."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bigmodel.checks.audit import count_by_torch, work_of
from bigmodel.config.settings import DataSettings, ModelSettings, Settings
from bigmodel.data.load.own_inputs import with_own_inputs
from bigmodel.data.objectives.examples import Examples
from bigmodel.data.plan.attention_work import Work
from bigmodel.metrics.flops import (
    first_pass_flops,
    flops,
    known_peak_flops,
    matrix_weights,
    measure_peak_flops,
    step_flops,
)
from bigmodel.metrics.phases import CompileTime, Phases, lags, slowest
from bigmodel.training.zero.wrapping import wrap_blocks
from tests.model.test_encoder_decoder import ENCODER_DECODERS, ONE_SIDE, PAIRS, TEXTS, TWO_SIDES
from tests.support.example_batches import batch_of, model_of, plan_of, text

MODELS = {  # of example_batches: 2 layers, 32 channels, 4 heads of 8 and 2 of keys, 40 hidden
    "decoder": {"qk_norm": True},
    "decoder, tied": {"tied_embeddings": True, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1},
    "decoder, windows and a cap": {"sliding_window": 5, "full_attention_every": 2, "attention_softcap": 3.0},
    "encoder": {"kind": "encoder"},
    "experts": {"experts": {"count": 4, "width": 24}},
    "experts, shared": {"experts": {"count": 4, "width": 24, "shared": 1, "first_dense_layers": 1}},
    **{f"both, {name}": {"kind": "encoder_decoder", **more} for name, more in ENCODER_DECODERS.items()},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_model_flops_are_those_that_torch_counts(changes: dict) -> None:
    """torch's counter takes attention over all pairs of a document, so the formula is given those."""
    both = changes.get("kind") == "encoder_decoder"
    batch = batch_of(PAIRS if both else TEXTS, DataSettings(**(TWO_SIDES if both else ONE_SIDE)))
    counted, expected = count_by_torch(model_of(**{**changes, "dropout": 0.0, "num_mtp_modules": 0}), batch)
    assert counted > 1e6
    assert counted == expected


AGAIN = {name: MODELS[name] for name in ("decoder", "encoder", "both, cross", "both, mixed_other_widths")}
AGAIN |= {name: MODELS[name] for name in ("experts", "experts, shared")}
AGAIN |= {"extra heads": {"num_mtp_modules": 2}, "dropout": {"dropout": 0.1}, "depth": {"stochastic_depth": 0.1}}
AGAIN |= {placement: {"norm_placement": placement} for placement in ("post", "output", "sandwich")}


@pytest.mark.parametrize("name", AGAIN)
def test_activation_checkpointing_computes_the_blocks_again_or_no_product_at_all(name: str) -> None:
    changes = {"dropout": 0.0} | AGAIN[name]
    both = changes.get("kind") == "encoder_decoder"
    batch = batch_of(PAIRS if both else TEXTS, DataSettings(**(TWO_SIDES if both else ONE_SIDE)))
    batch, counted = replace(batch, padding=None), {}  # the formula is given every position
    for kind in ("none", "selective", "full"):
        model = model_of(**changes)
        wrap_blocks(model, Settings(training={"activation_checkpointing": kind}), stage=1)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(batch).backward()
        counted[kind] = counter.get_total_flops()
    once, twice = (
        flops(
            model.settings,
            model.embedding.num_embeddings,
            work_of(batch, model.settings),
            (0, 0),
            recomputed=recomputed,
        ).hardware
        for recomputed in (False, True)
    )
    assert counted["selective"] == counted["none"]
    assert counted["full"] - counted["none"] == twice - once > 1e5


def test_mtp_modules_pass_their_blocks_and_the_head_again() -> None:
    plain, more = (
        ModelSettings(num_layers=2, hidden_size=32, num_heads=4, intermediate_size=40, num_mtp_modules=n)
        for n in (0, 2)
    )
    deeper = ModelSettings(num_layers=4, hidden_size=32, num_heads=4, intermediate_size=40)
    assert matrix_weights(more, 100).of_position == matrix_weights(deeper, 100).of_position + 2 * 100 * 32
    assert matrix_weights(plain, 100).of_position == 2 * (32 * 8 * (4 + 4 + 4 + 4) + 3 * 32 * 40) + 100 * 32


def test_a_token_passes_its_own_experts_and_padding_none() -> None:
    experts = {"count": 8, "per_token": 2, "width": 20, "shared": 1, "first_dense_layers": 1}
    settings = ModelSettings(num_layers=3, hidden_size=32, num_heads=4, intermediate_size=40, experts=experts)
    attention, one = 32 * 8 * (4 + 4 + 4 + 4), 3 * 32 * 20
    found = matrix_weights(settings, 100)
    assert found.of_position == 3 * attention + 3 * 32 * 40 + 2 * (3 * one + 8 * 32) + 100 * 32
    assert found.of_experts == 2 * 2 * one
    work = Work(positions=32, pairs=0)
    counted = flops(settings, 100, work, (36, 0), padding=(4, 0))
    assert counted.causal == 6 * found.of_position * 32
    assert counted.hardware == counted.causal + 6 * (found.of_position - found.of_experts) * 4


def test_the_conventions_differ_in_the_pairs_and_the_padding_only() -> None:
    settings = ModelSettings(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=48)
    work = Work(positions=32, pairs=2 * 214)  # documents of 9, 1, 17 and 5, in 2 layers
    found = flops(settings, 40, work, (36, 0), padding=(4, 0))
    weights = 2 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48) + 40 * 32
    assert found.causal == 6 * weights * 32 + 12 * 2 * 4 * 8 * 214
    assert found.full == 6 * weights * 32 + 12 * 2 * 4 * 8 * 32 * 36
    assert found.hardware == 6 * weights * 36 + 14 * 2 * 4 * 8 * 214
    again = flops(settings, 40, work, (36, 0), padding=(4, 0), recomputed=True)
    assert again[:2] == found[:2]
    products = weights - 40 * 32 - 2 * 32 * 48  # neither the head nor a block's last product
    assert again.hardware - found.hardware == 2 * products * 36 + 4 * 2 * 4 * 8 * 214
    assert text(9).tolist()[0] == 1


@pytest.mark.parametrize(("checkpointing", "again"), [("none", False), ("selective", False), ("full", True)])
def test_a_step_counts_the_forward_pass_that_full_checkpointing_does_again(checkpointing: str, again: bool) -> None:
    model = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
    table = {"model": model, "data": {"max_document_length": 36, "sequence_length": 36}}
    settings = Settings.model_validate(table | {"training": {"activation_checkpointing": checkpointing}})
    work = Work(positions=32, pairs=2 * 214)
    step = SimpleNamespace(num_tokens=32, num_padding=4, work=work)
    assert step_flops(settings, 40, step) == flops(settings.model, 40, work, (36, 0), (4, 0), recomputed=again)


def test_a_teacher_computes_a_forward_pass_that_is_not_the_models() -> None:
    student = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
    settings = Settings.model_validate({"model": student, "data": {"max_document_length": 36, "sequence_length": 36}})
    teacher = ModelSettings(**student | {"num_layers": 4})
    step = SimpleNamespace(num_tokens=32, num_padding=4, work=Work(positions=32, pairs=2 * 214))
    alone, taught = step_flops(settings, 40, step), step_flops(settings, 40, step, teacher=teacher)
    assert taught[:2] == alone[:2]
    weights = 4 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48) + 40 * 32
    assert taught.hardware - alone.hardware == 2 * weights * 36 + 4 * 4 * 8 * 4 * 214


@pytest.mark.parametrize("name", ["decoder", "both, cross", "both, mixed_other_widths", "extra heads"])
def test_the_first_pass_of_scheduled_sampling_is_counted(name: str) -> None:
    """torch counts a training step with and without it."""
    changes = MODELS.get(name, {"num_mtp_modules": 2})
    both = changes.get("kind") == "encoder_decoder"
    documents, sides = (PAIRS, TWO_SIDES) if both else (TEXTS, ONE_SIDE)
    data = DataSettings(**sides)
    plain, model = batch_of(documents, data), model_of(**changes)
    sampled = with_own_inputs(plain, plan_of(documents, Examples(data, 1, 60)), 1, 0.5)
    counted = []
    for batch in (plain, sampled):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(batch).backward()
        counted.append(counter.get_total_flops())
    work, vocabulary = work_of(plain, model.settings), model.embedding.num_embeddings
    first = first_pass_flops(model.settings, vocabulary, work, (64, 64), (0, 0), len(sampled.replaced))
    assert counted[1] - counted[0] == first.causal == first.hardware > 1e5


def test_a_step_counts_the_first_pass_by_its_schedule() -> None:
    model = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
    table = {"model": model, "data": {"max_document_length": 36, "sequence_length": 36}}
    settings = Settings.model_validate(table | {"training": {"scheduled_sampling": {"steps": 10, "share": 0.5}}})
    work = Work(positions=32, pairs=2 * 214)
    alone, sampled = (
        step_flops(
            settings,
            40,
            SimpleNamespace(number=n, num_tokens=32, num_labels=32, num_documents=4, num_padding=4, work=work),
        )
        for n in (0, 10)
    )
    assert alone == flops(settings.model, 40, work, (36, 0), (4, 0))
    weights, head = 2 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48), 40 * 32
    visible = 4 * 2 * 4 * 8 * 214
    assert sampled.causal - alone.causal == 2 * (weights * 32 + head * 14) + visible
    assert sampled.full - alone.full == 2 * (weights * 32 + head * 14) + 4 * 2 * 4 * 8 * 32 * 36
    assert sampled.hardware - alone.hardware == 2 * (weights * 36 + head * 14) + visible


def test_the_model_adds_up_z_over_micro_batches_without_its_mtp_modules() -> None:
    model, data = model_of(num_mtp_modules=1), DataSettings(**ONE_SIDE)
    expected = 0.0
    for batch in (batch_of(TEXTS, data), batch_of(TEXTS[1:], data)):
        model(batch).backward()
        squares = torch.logsumexp(model(batch, "logits"), -1).square()
        expected += float(squares[batch.labels != -100].sum())
    assert float(model.z_sum) == pytest.approx(expected, rel=1e-5)
    model.eval()
    model(batch)
    assert float(model.z_sum) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L400", None),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),  # a slice has a part of the chip
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("AMD Instinct MI250X", 191.5e12),  # torch sees each of its two dies
        ("AMD Instinct MI300X", 1307.4e12),
        ("Imaginary 9000", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name: str, peak: float | None) -> None:
    assert known_peak_flops(name) == peak


def test_the_peak_of_a_cpu_is_measured() -> None:
    peak = measure_peak_flops()
    began = time.perf_counter()
    a = torch.rand(256, 256)
    torch.mm(a, a)
    assert 2 * 256**3 / (time.perf_counter() - began) < 3 * peak
    assert 1e8 < peak < 1e14


# ---- phases -----------------------------------------------------------------------------------------------------


def test_phases_nest_without_counting_a_second_twice() -> None:
    phases = Phases(torch.device("cpu"))
    began = time.perf_counter()
    with phases("forward"):
        time.sleep(0.05)
    with phases("backward"):
        time.sleep(0.02)
        with phases("communication"):
            time.sleep(0.1)
        time.sleep(0.02)
    with phases("checkpoint"):
        time.sleep(0.03)
    phases.add("data", 0.25)
    wall = time.perf_counter() - began
    taken = dict(phases.take())
    assert set(taken) == {"forward", "backward", "communication", "checkpoint", "data"}
    assert taken.pop("data") == 0.25
    for name, least in (("forward", 0.05), ("backward", 0.04), ("communication", 0.1), ("checkpoint", 0.03)):
        assert least <= taken[name] <= wall - (0.22 - least), name
    assert sum(taken.values()) <= wall
    assert phases.busy_seconds == taken["forward"] + taken["backward"]
    assert not phases.take()


def test_a_phase_ends_with_an_error_too() -> None:
    phases = Phases(torch.device("cpu"))
    with pytest.raises(ValueError, match="boo"), phases("forward"):
        raise ValueError("boo")
    with phases("backward"):
        pass
    assert set(phases.take()) == {"forward", "backward"}


def test_a_phase_may_be_entered_by_the_thread_that_runs_the_backward() -> None:
    phases = Phases(torch.device("cpu"))

    def reduce() -> None:
        with phases("communication"):
            time.sleep(0.05)

    with phases("backward"):
        thread = threading.Thread(target=reduce)
        thread.start()
        thread.join()
    taken = phases.take()
    assert taken["communication"] >= 0.05 > taken["backward"]


@pytest.mark.parametrize(
    ("busy", "answer"), [([1.0], (None, None)), ([1.0, 3.0], (1, 2.0)), ([5.0, 1.0, 2.0, 2.5], (0, 3.0))]
)
def test_the_slowest_rank_and_its_lag(busy: list[float], answer: tuple) -> None:
    assert slowest(busy) == answer


def test_lags_are_those_of_all_ranks_or_of_the_slowest_of_many() -> None:
    assert lags([1.0]) == ((), ())
    assert lags([0.5, 0.1, 0.2, 0.25]) == ((300.0, -100.0, 0.0, 50.0), ())
    milliseconds, ranks = lags([0.1 + 0.001 * (7 * rank % 100) for rank in range(100)])
    assert ranks[:3] == (57, 14, 71)
    assert milliseconds[:3] == (50.0, 49.0, 48.0)
    assert len(milliseconds) == len(ranks) == 16


def test_time_in_the_compiler_is_counted() -> None:
    compile_time = CompileTime()
    compile_time.take()
    began = time.perf_counter()
    torch.compile(lambda x: x.sin() * 2, backend="eager")(torch.ones(3))
    spent = compile_time.take()
    assert 0 < spent <= time.perf_counter() - began
    assert compile_time.take() == 0


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place, mask=place < n), mask=place < n)


def test_time_in_tritons_own_compiler_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead of time for an architecture that is not here: Triton tells its listener as on a GPU, in 3.6 and 3.7."""
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    types = {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}

    def compile_it(block: int) -> float:
        began = time.perf_counter()
        source = ASTSource(copy_kernel, types, constexprs={(3,): block})
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
        return time.perf_counter() - began

    compile_time = CompileTime()
    compile_time.take()
    seconds = compile_it(128)
    spent = compile_time.take()
    assert 0.5 * seconds < spent <= seconds
    compile_it(128)  # from its cache
    assert compile_time.take() < 0.5 * spent
    inside = torch._guards.CompileContext(torch._guards.CompileId(frame_id=0, frame_compile_id=0))
    with torch._guards.compile_context(inside):  # torch.compile counts what it has Triton compile as its own
        compile_it(256)
    assert compile_time.take() == 0
    knobs.compilation.listener(times=SimpleNamespace(total=-5_000_000), cache_hit=False)  # the clock was set back
    assert compile_time.take() == 0
