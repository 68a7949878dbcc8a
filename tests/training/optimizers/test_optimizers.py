"""Parameter groups, AdamW and the learning rate of each step."""

import itertools
import math

import pytest
import torch

from bigmodel.checks.plain_torch import alone, plain_optimizer
from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import OptimizerSettings, Settings, UserError, positions_before
from bigmodel.inspect.memory import state_bytes
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer
from bigmodel.training.learning_rate import SCHEDULES, learning_rate
from bigmodel.training.optimizers.adafactor import Adafactor
from bigmodel.training.optimizers.groups import build_optimizer, parameter_groups, states_of
from bigmodel.training.optimizers.muon import orthogonalize
from bigmodel.training.optimizers.shards import Part, Shards
from bigmodel.training.optimizers.table import OPTIMIZERS
from bigmodel.training.zero.layouts import ParameterShard


def model(tied: bool) -> Transformer:
    table = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_heads": 2,
        "num_kv_heads": 1,
        "intermediate_size": 12,
        "qk_norm": True,
    }
    net = Transformer(Settings.model_validate({"model": table | {"tied_embeddings": tied}}).model, vocabulary=11)
    init_weights(net, seed=1)  # the head's weight is made without values
    return net


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_norms_and_embeddings_do_not(tied: bool) -> None:
    net = model(tied)
    decayed, free = parameter_groups(net, OptimizerSettings(weight_decay=0.1))
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert {names[id(parameter)] for parameter in decayed["params"]} == {
        "blocks.0.attention.query_key_value.weight",
        "blocks.0.attention.output.weight",
        "blocks.0.feed_forward.gate_up.weight",
        "blocks.0.feed_forward.down.weight",
    } | (set() if tied else {"head.weight"})
    assert "embedding.weight" in {names[id(parameter)] for parameter in free["params"]}
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_adamw_takes_its_settings() -> None:
    settings = OptimizerSettings(learning_rate=0.02, beta1=0.8, beta2=0.7, epsilon=1e-3, weight_decay=0.3)
    adamw = build_optimizer(model(tied=True), settings)
    for group in adamw.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.7), 1e-3)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0.0]


def test_one_update_is_that_of_the_paper() -> None:
    """weight 1, gradient 2, decay 0.5, rate 0.1: 1 * (1 - 0.05) - 0.1 * 2 / (2 + 0) = 0.85."""
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight.data.fill_(1.0)
    adamw = build_optimizer(linear, OptimizerSettings(learning_rate=0.1, weight_decay=0.5, epsilon=1e-12))
    linear.weight.grad = torch.full((1, 1), 2.0)
    adamw.step()
    assert linear.weight.item() == pytest.approx(0.85, abs=1e-6)


def test_one_update_of_lion_is_that_of_the_paper() -> None:
    """weight 1, moment 0.1, gradient -2, betas 0.9 and 0.99, decay 0.5, rate 0.1:

    sign(0.9 * 0.1 + 0.1 * -2) = -1; 1 * (1 - 0.05) + 0.1 = 1.05; moment 0.99 * 0.1 + 0.01 * -2 = 0.079.
    """
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight.data.fill_(1.0)
    values = {"kind": "lion", "learning_rate": 0.1, "weight_decay": 0.5, "beta1": 0.9, "beta2": 0.99}
    lion = build_optimizer(linear, OptimizerSettings(**values))
    lion.state[linear.weight]["exp_avg"] = torch.full((1, 1), 0.1)
    linear.weight.grad = torch.full((1, 1), -2.0)
    lion.step()
    assert linear.weight.item() == pytest.approx(1.05, abs=1e-6)
    assert lion.state[linear.weight]["exp_avg"].item() == pytest.approx(0.079, abs=1e-6)


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
def test_muon_is_torch_s_on_matrices_and_adamw_on_the_rest(scale: str) -> None:
    """torch's computes in bf16, which is good to a few parts in a hundred of an update."""
    settings = OptimizerSettings(kind="muon", learning_rate=0.1, weight_decay=0.2, momentum=0.9, matrix_scale=scale)
    ours, theirs = model(tied=False), model(tied=False)
    theirs.load_state_dict(ours.state_dict())
    groups = {group["matrices"]: group for group in parameter_groups(ours, settings)}
    names = {id(parameter): name for name, parameter in ours.named_parameters()}
    matrices = [names[id(parameter)] for parameter in groups[True]["params"]]
    assert matrices == [
        "blocks.0.attention.query_key_value.weight",
        "blocks.0.attention.output.weight",
        "blocks.0.feed_forward.gate_up.weight",
        "blocks.0.feed_forward.down.weight",
    ]
    muon = alone(build_optimizer(ours, settings), settings)
    oracle = torch.optim.Muon(
        [theirs.get_parameter(name) for name in matrices],
        lr=0.1,
        weight_decay=0.2,
        momentum=0.9,
        adjust_lr_fn=scale,
    )
    rest = {"lr": 0.1, "betas": (settings.beta1, settings.beta2), "eps": settings.epsilon}
    decays = {"head.weight": 0.2}
    others = [name for name, _ in theirs.named_parameters() if name not in matrices]
    adamw = torch.optim.AdamW(
        [{"params": [theirs.get_parameter(name)], "weight_decay": decays.get(name, 0.0)} for name in others],
        lr=rest["lr"],
        betas=rest["betas"],
        eps=rest["eps"],
    )
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = two.grad = torch.randn(one.shape, generator=generator)
        muon.step(), oracle.step(), adamw.step()
    for name, parameter in ours.named_parameters():
        moved = (theirs.get_parameter(name) - before[name]).norm()
        tolerance = 0.05 if name in matrices else 1e-5
        assert (parameter - theirs.get_parameter(name)).norm() < tolerance * moved, name


def test_muon_orthogonalises_each_part_of_a_joined_matrix() -> None:
    """An update of parts is that of separate matrices of the same gradients."""
    values = {"kind": "muon", "learning_rate": 0.1, "weight_decay": 0.2, "matrix_scale": "original"}
    ours, rows = model(tied=False), {"attention.query_key_value": [8, 4, 4], "feed_forward.gate_up": [12, 12]}
    settings = OptimizerSettings(**values, joined_matrices="parts")
    muon = alone(build_optimizer(ours, settings), settings)
    for name, sizes in rows.items():
        joined = ours.get_parameter(f"blocks.0.{name}.weight")
        joined.grad = torch.randn(joined.shape, generator=torch.Generator().manual_seed(3))
        assert sum(sizes) == len(joined), name
        apart = torch.nn.ParameterList(part.detach().clone() for part in joined.split(sizes))
        for one, gradient in zip(apart, joined.grad.split(sizes), strict=True):
            one.grad = gradient.clone()
        alone(build_optimizer(apart, OptimizerSettings(**values)), OptimizerSettings(**values)).step()
        muon.step()
        assert torch.equal(joined, torch.cat(list(apart))), name
        joined.grad = None


class PlainAdEMAMix:
    """As in Algorithm 1 and Appendix A of Pagliardini et al. 2024, of one parameter, in float64."""

    def __init__(self, weight: torch.Tensor, rate: float, decay: float, settings: OptimizerSettings) -> None:
        self.weight, self.rate, self.decay, self.settings, self.t = weight.double(), rate, decay, settings, 0
        self.m1, self.m2, self.nu = (torch.zeros_like(self.weight) for _ in range(3))

    def step(self, gradient: torch.Tensor) -> None:
        self.t += 1
        given, g = self.settings, gradient.double()
        b1, b2, b3, alpha = given.beta1, given.beta2, given.beta3, given.alpha
        if self.t < given.ema_warmup_steps:
            mu = self.t / given.ema_warmup_steps
            alpha *= mu
            if b1:
                logs = math.log(b1) * math.log(b3)
                b3 = min(b3, math.exp(logs / ((1 - mu) * math.log(b3) + mu * math.log(b1))))
            else:
                b3 = b3 ** (1 / mu)
        self.m1 = b1 * self.m1 + (1 - b1) * g
        self.m2 = b3 * self.m2 + (1 - b3) * g
        self.nu = b2 * self.nu + (1 - b2) * g * g
        m1_hat, nu_hat = self.m1 / (1 - b1**self.t), self.nu / (1 - b2**self.t)
        update = (m1_hat + alpha * self.m2) / (nu_hat.sqrt() + given.epsilon) + self.decay * self.weight
        self.weight = self.weight - self.rate * update


@pytest.mark.parametrize("warmup", [0, 4, 40])
@pytest.mark.parametrize("beta1", [0.0, 0.85])
def test_ademamix_is_that_of_the_paper(warmup: int, beta1: float) -> None:
    """Every setting away from its default, before, at and after the end of the warm-ups."""
    values = {"beta1": beta1, "beta2": 0.9, "beta3": 0.97, "alpha": 3.0, "epsilon": 1e-6, "ema_warmup_steps": warmup}
    settings = OptimizerSettings(kind="ademamix", learning_rate=0.02, weight_decay=0.3, **values)
    ours = model(tied=False).double()
    ademamix = alone(build_optimizer(ours, settings), settings)
    decays = {id(one): group["weight_decay"] for group in ademamix.param_groups for one in group["params"]}
    plain = [PlainAdEMAMix(one.detach().clone(), 0.02, decays[id(one)], settings) for one in ours.parameters()]
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(ours.parameters(), plain, strict=True):
            one.grad = (step + 1) * torch.randn(one.shape, generator=generator, dtype=torch.float64)
            other.step(one.grad)
        ademamix.step()
    for (name, one), other in zip(ours.named_parameters(), plain, strict=True):
        assert torch.allclose(one, other.weight, rtol=1e-10, atol=1e-12), name
        assert torch.allclose(ademamix.state[one]["exp_avg_slow"], other.m2, rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_is_built_and_keeps_the_states_of_its_row(kind: str) -> None:
    """After an update it has no state that the table does not name, and has used all that it names."""
    settings = OptimizerSettings(kind=kind)
    net = model(tied=False)
    optimizer = optimizer_alone(net, settings)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            named = {state.key for state in states_of(settings, group) if state.shape in ("parameter", "number")}
            assert set(optimizer.state[parameter]) == named
            assert all(state.any() for state in optimizer.state[parameter].values())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_memory_plan_counts_the_states_of_each_optimizer(kind: str) -> None:
    table = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_heads": 2,
        "num_kv_heads": 1,
        "intermediate_size": 12,
        "qk_norm": True,
    }
    settings = Settings.model_validate({"model": table, "optimizer": {"kind": kind}})
    net = model(tied=False)
    optimizer = optimizer_alone(net, settings.optimizer)
    states = [state for one in optimizer.state.values() for key, state in one.items() if key != "step"]
    if kind == "adafactor":
        states += [vector for one in net.parameters() for vector in optimizer.shards.parts(one)[0].vectors]
    plan = state_bytes(settings, resolve_deepspeed(settings, 1)[0], 11, 1)
    assert plan.device["moments"] == sum(state.nbytes for state in states)


def optimizer_alone(model: torch.nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """As the engine sets it up where every parameter is its own master."""
    make = adafactor_alone if settings.kind == "adafactor" else lambda *given: alone(build_optimizer(*given), settings)
    return make(model, settings)


def adafactor_alone(model: torch.nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """As the engine sets it up where every parameter is its own master."""
    adafactor = build_optimizer(model, settings)
    assert isinstance(adafactor, Adafactor)
    parts: dict[torch.Tensor, list[Part]] = {}
    for parameter in model.parameters():
        shape, adafactor.state[parameter]["step"] = tuple(parameter.shape), torch.zeros(())
        vectors = tuple(torch.zeros(size) for size in shape) if len(shape) == 2 else ()
        if not vectors:
            adafactor.state[parameter]["variance"] = torch.zeros(shape)
        parts[parameter] = [Part(shape, ParameterShard(0, parameter.numel(), 0, 0), vectors)]
    adafactor.shards = Shards(lambda master, flat, change: change(flat), parts.__getitem__, lambda sums: sums)
    return adafactor


@pytest.mark.parametrize("scale", [1e-6, 1.0], ids=["gradients near epsilon", "large gradients"])
def test_adafactor_is_torch_s(scale: float) -> None:
    """Every setting away from its default; the rate is above 1/sqrt(t) from the fourth update on."""
    values = {"epsilon": 1e-7, "beta2_decay": -0.6, "update_clipping": 1.2, "least_scale": 0.2, "weight_decay": 0.1}
    settings = OptimizerSettings(kind="adafactor", learning_rate=0.55, **values)
    ours, theirs = model(tied=False), model(tied=False)
    init_weights(ours, 1)
    theirs.load_state_dict(ours.state_dict())
    adafactor, oracle = adafactor_alone(ours, settings), plain_optimizer(theirs, settings)
    for group in oracle.param_groups:
        group["lr"] = 0.55
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = scale * (step + 1) * torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        adafactor.step(), oracle.step()
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6), name
        states = adafactor.shards.parts(one)[0].vectors or (adafactor.state[one]["variance"],)
        keys = ("row_var", "col_var") if one.dim() == 2 else ("variance",)
        for state, key in zip(states, keys, strict=True):
            assert torch.allclose(state, oracle.state[two][key].view(state.shape), rtol=1e-5, atol=0), (name, key)


@pytest.mark.parametrize("cuts", [[0, 35], [0, 14, 35], [0, 3, 5, 17, 18, 35]], ids=str)
def test_parts_of_a_matrix_have_the_sums_and_second_moments_of_the_whole(cuts: list[int]) -> None:
    """5 rows of 7, cut between rows, inside them, and twice inside one; a rank without any part adds nothing."""
    weights, gradient = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    row_var, col_var = torch.rand(5) + 0.1, torch.rand(7)
    parts = [Part((5, 7), ParameterShard(a, b - a, 0, a), (row_var, col_var)) for a, b in itertools.pairwise(cuts)]
    parts.append(Part((5, 7), None, (row_var, col_var)))
    sums = sum(part.sums(weights.flatten(), gradient.flatten()) for part in parts)
    squares = gradient.square()
    assert torch.allclose(sums, torch.cat([weights.square().sum().view(1), squares.sum(1), squares.sum(0)]))
    moments = torch.cat([part.estimate(1e-7) for part in parts[:-1]]).view(5, 7)
    assert torch.allclose(moments, torch.outer(row_var, col_var) / row_var.mean())


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (16, 16)])
def test_orthogonalizing_brings_every_singular_value_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalize(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert (found * (left @ right)).sum() / found.norm() / (left @ right).norm() > 0.97


def test_a_group_has_its_own_rate_and_decay_and_the_last_pattern_wins() -> None:
    groups = [
        {"parameters": "blocks.*", "learning_rate_factor": 0.5},
        {"parameters": "*.down.weight", "learning_rate_factor": 0.25, "weight_decay": 0.3},
    ]
    net = model(tied=False)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = {
        names[id(parameter)]: (group["rate_factor"], group["weight_decay"])
        for group in parameter_groups(net, OptimizerSettings(weight_decay=0.1, groups=groups))
        for parameter in group["params"]
    }
    assert found["head.weight"] == (1.0, 0.1)
    assert found["embedding.weight"] == (1.0, 0.0)
    assert found["blocks.0.attention.output.weight"] == (0.5, 0.1)
    assert found["blocks.0.feed_forward.down.weight"] == (0.25, 0.3)
    assert found["blocks.0.attention_norm.weight"] == (0.5, 0.0)


def test_a_pattern_that_fits_nothing_is_an_error() -> None:
    settings = OptimizerSettings(groups=[{"parameters": "layers.*"}])
    with pytest.raises(
        UserError, match=r'parameters = "layers\.\*" matches no trained parameter; names are .*embedding\.weight'
    ):
        parameter_groups(model(tied=True), settings)


def rates(steps: int, **schedule: object) -> list[float]:
    table = {"training": {"steps": steps}, "optimizer": {"learning_rate": 1.0}, "schedule": schedule}
    settings = Settings.model_validate(table)
    return [learning_rate(step, settings) for step in range(steps)]


def test_cosine_warms_up_and_falls_to_the_final_ratio() -> None:
    found = rates(8, kind="cosine", warmup_steps=4, final_ratio=0.2)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert found[5:] == pytest.approx([0.6, 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2, 0.2])


def test_wsd_warms_up_stays_and_decays() -> None:
    found = rates(10, kind="wsd", warmup_steps=2, decay_steps=4, final_ratio=0.0)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


def test_wsd_without_decay_stays() -> None:
    assert rates(4, kind="wsd", warmup_steps=0, decay_steps=0) == [1.0, 1.0, 1.0, 1.0]


def test_linear_falls_in_equal_parts_and_constant_does_not() -> None:
    assert rates(6, kind="linear", warmup_steps=2, final_ratio=0.2) == pytest.approx([0.5, 1, 0.8, 0.6, 0.4, 0.2])
    assert rates(4, kind="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]


def test_inverse_square_root_falls_from_the_warm_up_to_the_final_ratio() -> None:
    found = rates(40, kind="inverse_square_root", warmup_steps=4, final_ratio=0.4)
    assert found[3] == 1.0
    assert found[15] == pytest.approx(math.sqrt(4 / 16))
    assert found[39] == 0.4


def test_a_schedule_in_tokens_follows_the_positions_of_a_ramping_batch() -> None:
    """2, 2, 4, 4 packs of 100: 200, 400, 800, 1,200 positions done; warm-up 400, the rest falls over 800."""
    schedule = {"kind": "linear", "unit": "tokens", "warmup_tokens": 400, "final_ratio": 0.0}
    training = {"steps": 4, "global_batch_size": 2, "batch_ramp": [[2, 4]]}
    data = {"sequence_length": 100, "max_document_length": 100}
    table = {"training": training, "data": data, "optimizer": {"learning_rate": 1.0}, "schedule": schedule}
    settings = Settings.model_validate(table)
    assert [positions_before(step, settings) for step in range(5)] == [0, 200, 400, 800, 1200]
    assert [learning_rate(step, settings) for step in range(4)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (
            {"warmup_steps": 3, "decay_steps": 2},
            r"warmup_steps \+ schedule.decay_steps = 3 \+ 2 exceeds training.steps = 4",
        ),
        (
            {"unit": "tokens", "warmup_tokens": 900, "decay_tokens": 301},
            r"= 1,201 exceeds the 1,200 tokens of training.steps = 4; shorten them or train longer",
        ),
    ],
)
def test_a_schedule_longer_than_the_run_is_refused(schedule: dict, words: str) -> None:
    training = {"steps": 4, "global_batch_size": 2, "batch_ramp": [[2, 4]]}
    table = {"training": training, "data": {"sequence_length": 100, "max_document_length": 100}}
    with pytest.raises(ValueError, match=words):
        Settings.model_validate(table | {"schedule": {"kind": "wsd"} | schedule})


def test_the_default_warm_up_is_shortened_only_where_it_does_not_fit() -> None:
    found = [Settings.model_validate({"training": {"steps": steps}}).schedule.warmup_steps for steps in (5, 99, 100)]
    assert found == [0, 9, 100]
    assert Settings().schedule.warmup_steps == 100
    decays = {"training": {"steps": 120}, "schedule": {"kind": "wsd", "decay_steps": 50}}
    assert Settings.model_validate(decays).schedule.warmup_steps == 12
    with pytest.raises(ValueError, match=r"= 100 \+ 0 exceeds training.steps = 5"):
        Settings.model_validate({"training": {"steps": 5}, "schedule": {"warmup_steps": 100}})


@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_a_run_that_is_all_warm_up_ends_at_the_peak(kind: str) -> None:
    assert rates(3, kind=kind, warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1.0])


@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_the_learning_rate_depends_on_the_step_alone(kind: str) -> None:
    assert rates(20, kind=kind, warmup_steps=5)[13] == rates(20, kind=kind, warmup_steps=5)[13] > 0
