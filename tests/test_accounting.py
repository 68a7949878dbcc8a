"""Parameters and FLOPs by formula equal what torch counts; peaks and phases are what they say."""

import threading
import time
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bigmodel.accounting import flops, known_peak_flops, matrix_weights, measure_peak_flops, num_parameters
from bigmodel.config import ModelSettings
from bigmodel.data.batch import Batch
from bigmodel.model.transformer import Transformer
from bigmodel.training.phases import CompileTime, Phases, slowest
from kernels.visibility import causal, dense

VOCABULARY = 40
SETTINGS = [
    ModelSettings(layers=2, width=32, heads=4, key_value_heads=2, feed_forward_width=48, qk_norm=True),
    ModelSettings(layers=3, width=24, heads=3, key_value_heads=3, feed_forward_width=20, tied_embeddings=True),
]
LENGTHS = [9, 1, 17, 5]  # and 4 positions of padding


def batch(lengths: list[int], padding: int) -> Batch:
    edges = torch.tensor([0, *lengths, padding]).cumsum(0)
    count = int(edges[-1])
    targets = torch.arange(count) % VOCABULARY
    targets[count - padding :] = -100
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(edges.tolist())])
    return Batch(
        tokens=torch.arange(count) % VOCABULARY,
        targets=targets,
        positions=positions,
        offsets=edges.to(torch.int32),
        keys=torch.zeros(count, dtype=torch.int64),
        num_positions=count - padding,
        num_targets=count - padding,
        num_documents=len(lengths),
    )


@pytest.mark.parametrize("settings", SETTINGS, ids=["untied", "tied"])
def test_parameters_are_those_of_the_model(settings: ModelSettings) -> None:
    model = Transformer(settings, VOCABULARY)
    assert num_parameters(settings, VOCABULARY) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("settings", SETTINGS, ids=["untied", "tied"])
def test_model_flops_are_those_that_torch_counts(settings: ModelSettings) -> None:
    """torch's counter takes attention over all pairs of a document, so the formula is given those."""
    model = Transformer(settings, VOCABULARY)
    packed = batch(LENGTHS, padding=0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(packed, "logits"), packed.targets).backward()
    counted = counter.get_total_flops()
    pairs = sum(length**2 for length in LENGTHS)
    assert counted > 1e6
    assert counted == flops(settings, VOCABULARY, pack_tokens=0, positions=32, padding=0, pairs=pairs).causal


def test_the_two_conventions_differ_in_the_pairs_only() -> None:
    settings = SETTINGS[0]
    pairs = sum(length * (length + 1) // 2 for length in LENGTHS)
    visible = dense(causal(batch(LENGTHS, padding=0).offsets), 32, 32)
    assert int(visible.sum()) == pairs == 214  # 45 + 1 + 153 + 15
    found = flops(settings, VOCABULARY, pack_tokens=36, positions=32, padding=4, pairs=pairs)
    weights = matrix_weights(settings, VOCABULARY)
    assert weights == 2 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48) + 40 * 32  # q, k, v, output; SwiGLU; head
    assert found.causal == 6 * weights * 32 + 12 * 2 * 4 * 8 * pairs
    assert found.full == 6 * weights * 32 + 12 * 2 * 4 * 8 * 32 * 36
    assert found.hardware == 6 * weights * 36 + 14 * 2 * 4 * 8 * pairs
    again = flops(settings, VOCABULARY, 36, positions=32, padding=4, pairs=pairs, blocks_recomputed=1.0)
    assert again.hardware - found.hardware == 2 * (weights - 40 * 32) * 36 + 4 * 2 * 4 * 8 * pairs
    assert again[:2] == found[:2]


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


def test_time_in_the_compiler_is_counted() -> None:
    compile_time = CompileTime()
    compile_time.take()
    began = time.perf_counter()
    torch.compile(lambda x: x.sin() * 2, backend="eager")(torch.ones(3))
    spent = compile_time.take()
    assert 0 < spent <= time.perf_counter() - began
    assert compile_time.take() == 0
