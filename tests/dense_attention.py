"""What the attention tests measure against: the formula with a dense mask, and inputs surrounded by NaN."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.visibility import Visibility, dense


def dense_attention(q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, visibility: Visibility) -> Tensor:
    """softmax(q k / sqrt(K)) v over the visible keys, in the type of the inputs; 0 where a query sees nothing."""
    group = q_THK.shape[1] // k_SGK.shape[1]
    k_SHK, v_SHK = k_SGK.repeat_interleave(group, 1), v_SGK.repeat_interleave(group, 1)
    hidden_TS = ~dense(visibility, q_THK.shape[0], k_SGK.shape[0])
    score_HTS = torch.einsum("thk,shk->hts", q_THK, k_SHK) * q_THK.shape[2] ** -0.5
    p_HTS = score_HTS.masked_fill(hidden_TS, -torch.inf).softmax(-1).masked_fill(hidden_TS, 0.0)
    return torch.einsum("hts,shk->thk", p_HTS, v_SHK)


@dataclass
class Inputs:
    """q, k, v and the gradient of the output. Rows beyond the last offset and everything around them is NaN."""

    visibility: Visibility
    q_THK: Tensor
    k_SGK: Tensor
    v_SGK: Tensor
    d_out_THK: Tensor

    @property
    def num_queries(self) -> int:
        return len(self.q_THK)

    @property
    def num_keys(self) -> int:
        return len(self.k_SGK)

    def in_documents(self, dtype: torch.dtype) -> "Inputs":
        """A copy whose rows beyond the last offset are 0: what a formula that touches every row can be given."""
        return Inputs(self.visibility, *(self._rows(name).nan_to_num(0.0).to(dtype) for name in ROWS))

    def _rows(self, name: str) -> Tensor:
        return getattr(self, name)


ROWS = ["q_THK", "k_SGK", "v_SGK", "d_out_THK"]


def make_inputs(
    visibility: Visibility, queries: int, keys: int, heads: tuple[int, int], channels: int, dtype: torch.dtype
) -> Inputs:
    """Random inputs. q, k and v of one length are slices of one fused tensor, as a fused projection gives them."""
    generator = torch.Generator().manual_seed(7)
    num_heads, num_key_heads = heads

    def surrounded(rows: int, last_offset: int, width: int) -> Tensor:
        whole = torch.full((rows + 40, width, channels + 8), torch.nan, dtype=dtype)
        inner = whole[20:-20, :, :channels]
        inner[:last_offset] = torch.randn(last_offset, width, channels, generator=generator).to(dtype)
        return inner

    query_end, key_end = int(visibility.query_offsets[-1]), int(visibility.key_offsets[-1])
    if (queries, query_end) == (keys, key_end):
        fused = surrounded(queries, query_end, num_heads + 2 * num_key_heads)
        q_THK, k_SGK, v_SGK = fused.split([num_heads, num_key_heads, num_key_heads], dim=1)
    else:
        q_THK = surrounded(queries, query_end, num_heads)
        k_SGK, v_SGK = surrounded(keys, key_end, 2 * num_key_heads).chunk(2, dim=1)
    return Inputs(visibility, q_THK, k_SGK, v_SGK, surrounded(queries, query_end, num_heads))


def out_and_gradients(attend, inputs: Inputs) -> list[Tensor]:
    """[out, dq, dk, dv] of `attend(q, k, v, visibility)`."""
    leaves = [rows.detach().requires_grad_() for rows in (inputs.q_THK, inputs.k_SGK, inputs.v_SGK)]
    out_THK = attend(*leaves, inputs.visibility)
    return [out_THK.detach(), *torch.autograd.grad(out_THK, leaves, inputs.d_out_THK)]


def assert_as_exact_as_plain_torch(attend, inputs: Inputs) -> None:
    """Errors against float64 are at most 2 (out) and 3 (gradients) times those of plain torch in the inputs' type."""
    dtype = inputs.q_THK.dtype
    truth = out_and_gradients(dense_attention, inputs.in_documents(torch.float64))
    plain = out_and_gradients(dense_attention, inputs.in_documents(dtype))
    ours = out_and_gradients(attend, inputs)
    for name, factor, exact, torch_rows, our_rows in zip(
        ["out", "dq", "dk", "dv"], [2, 3, 3, 3], truth, plain, ours, strict=True
    ):
        assert our_rows.dtype == dtype
        assert exact.abs().max() > 0.1, f"{name}: nothing to compare"
        torch_error = (torch_rows.double() - exact).abs().max().item()
        our_error = (our_rows.double() - exact).abs().max().item()
        bound = factor * torch_error + torch.finfo(dtype).eps
        assert our_error <= bound, f"{name}: error {our_error:.2e}, plain torch {torch_error:.2e}, bound {bound:.2e}"
        beyond = inputs.visibility.query_offsets[-1] if name in ("out", "dq") else inputs.visibility.key_offsets[-1]
        assert (our_rows[beyond:] == 0).all(), f"{name}: rows beyond the last offset are not 0"
