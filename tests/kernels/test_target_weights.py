"""Weights of labels: a position counts with its weight in the loss, in z and in both gradients."""

import pytest
import torch

from bigmodel.kernels.linear_cross_entropy import (
    IGNORED,
    Options,
    linear_cross_entropy,
    linear_cross_entropy_per_token,
)
from tests.support.dense_cross_entropy import OPTIONS, make_inputs, make_weights, our_results, weighted_dense_results

EVERYTHING = Options(z_loss=0.03, label_smoothing=0.2, logit_softcap=2.5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_in_float64_weighted_sums_and_gradients_are_the_formula(options: Options) -> None:
    inputs = make_inputs(torch.float64)
    weights_T = make_weights(inputs)
    exact = weighted_dense_results(inputs, weights_T, options)
    for ours, expected in zip(our_results(inputs, options, 5, weights_T), exact, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_one_are_no_weights_bitwise(dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype)
    plain, weighted = (
        our_results(inputs, EVERYTHING, 5, weights_T) for weights_T in (None, torch.ones(len(inputs.labels_T)))
    )
    assert all(torch.equal(one, other) for one, other in zip(plain, weighted, strict=True))


def test_a_weight_of_zero_is_an_ignored_label_but_for_the_count() -> None:
    inputs = make_inputs()
    weights_T = torch.ones(len(inputs.labels_T))
    weights_T[10:15] = 0.0
    weighted = our_results(inputs, EVERYTHING, 5, weights_T)
    inputs.labels_T[10:15] = IGNORED
    ignored = our_results(inputs, EVERYTHING, 5)
    assert int(weighted.count) == int(ignored.count) + 5
    for name in ("loss_sum", "z_sum", "grad_hidden_TH", "grad_weight_VH"):
        assert torch.equal(getattr(weighted, name), getattr(ignored, name)), name


def test_losses_of_single_positions_have_their_weight() -> None:
    inputs = make_inputs()
    weights_T = make_weights(inputs)
    plain_T, weighted_T = (linear_cross_entropy_per_token(*inputs, 2.5, 4, weights) for weights in (None, weights_T))
    assert torch.equal(weighted_T, plain_T * weights_T)
    assert weighted_T.count_nonzero() > 10


@pytest.mark.parametrize("weights_T", [torch.ones(5), torch.ones(23, dtype=torch.float64)])
def test_weights_of_another_shape_or_type_are_refused(weights_T: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"weights \(\d+,\) of torch.float\d+; it needs T weights of torch.float32"):
        linear_cross_entropy(*make_inputs(), weights_T=weights_T)
