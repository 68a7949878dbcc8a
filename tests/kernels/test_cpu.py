"""Where bf16 is multiplied on a CPU: in its units or in fp32, always added up in fp32 and rounded once."""

import torch

from bigmodel.kernels.cpu import bf16_products, has_bf16_units, is_wide
from bigmodel.model.layers import Linear


def test_only_16_bit_types_without_units_are_widened() -> None:
    assert not is_wide(torch.zeros(1))
    assert is_wide(torch.zeros(1, dtype=torch.float16))
    assert is_wide(torch.zeros(1, dtype=torch.bfloat16)) != has_bf16_units()
    assert not is_wide(torch.zeros(1, dtype=torch.bfloat16, device="meta"))


def test_a_bf16_product_is_rounded_once() -> None:
    torch.manual_seed(1)
    layer, x = Linear(512, 64, bias=True).bfloat16(), torch.randn(100, 512).bfloat16().requires_grad_()
    out, d_out = layer(x), torch.randn(100, 64).bfloat16()
    found = out, *torch.autograd.grad(out, (x, layer.weight), d_out)
    wide = [one.detach().double() for one in (x, layer.weight, layer.bias, d_out)]
    exact = wide[0] @ wide[1].T + wide[2], wide[3] @ wide[1], wide[3].T @ wide[0]
    for ours, truth in zip(found, exact, strict=True):
        assert ((ours.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-4).all()


def test_products_of_widened_bf16_are_as_exact_as_in_fp32_and_the_setting_is_restored() -> None:
    torch.manual_seed(1)
    before = torch.backends.mkldnn.matmul.fp32_precision
    left, right = (torch.randn(256, 256).bfloat16() for _ in range(2))
    with bf16_products():
        found = left.float() @ right.float()
    exact = left.double() @ right.double()
    assert (found - exact).abs().max() < 1e-4
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_products_of_fp32_are_exact_after_overlapping_callers() -> None:
    """A caller that ends while another is inside must not leave the rounding on."""
    first, second = bf16_products(), bf16_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    left, right = torch.randn(2, 200, 200, generator=torch.Generator().manual_seed(1))
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
    assert (left @ right - (left.double() @ right.double())).abs().max() < 1e-4
