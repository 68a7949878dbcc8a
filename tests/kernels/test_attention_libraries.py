"""Attention by other libraries: our masks in the arguments of varlen calls, computed by a reference of their documents.

The libraries themselves run in tests/gpu only.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bigmodel.kernels.attention import KERNELS, make_tile_metadata
from bigmodel.kernels.attention_kernels import AttentionCall
from bigmodel.kernels.attention_libraries import LIBRARIES, Varlen, attend_by, missing, refusal_of_packed, varlen_of
from bigmodel.kernels.mask import AttentionMask, bidirectional, causal, cross, prefix_lm
from tests.kernels.test_mask import int32, offsets_of
from tests.support.dense_attention import assert_as_exact_as_plain_torch, make_inputs

MIXED = offsets_of([0, 1, 40, 0, 7, 0, 0])


class UnwrittenOutside(torch.autograd.Function):
    """NaN in the rows beyond `count`, forwards and backwards: memory that a kernel does not write."""

    @staticmethod
    def forward(context, rows, count):
        context.count = count
        return torch.cat([rows[:count], torch.full_like(rows[count:], torch.nan)])

    @staticmethod
    def backward(context, d_rows):
        return torch.cat([d_rows[: context.count], torch.full_like(d_rows[context.count :], torch.nan)]), None


def documented(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> Tensor:
    """What flash_attn_varlen_func and torch's varlen_attn document: query i of a document with n queries and m keys
    attends to the keys from i + m - n - left to i + m - n + right, both included; -1: no limit."""
    edges, (left, right) = varlen.cu_seqlens.tolist(), varlen.window
    assert max(b - a for a, b in pairwise(edges)) == varlen.longest
    q, k, v = (UnwrittenOutside.apply(rows, edges[-1]) for rows in (q, k, v))
    out = [q.new_zeros(0, *q.shape[1:])]
    for begin, end in pairwise(edges):
        rows, group = slice(begin, end), q.shape[1] // k.shape[1]
        score = torch.einsum("thk,shk->hts", q[rows], k[rows].repeat_interleave(group, 1)) * scale
        query, key = torch.arange(end - begin)[:, None], torch.arange(end - begin)
        hidden = ((key < query - left) & (left >= 0)) | ((key > query + right) & (right >= 0))
        weights = score.masked_fill(hidden, -torch.inf).softmax(-1)
        out.append(torch.einsum("hts,shk->thk", weights, v[rows].repeat_interleave(group, 1)))
    written = torch.cat(out)
    return torch.cat([written, written.new_full((len(q) - edges[-1], *q.shape[1:]), torch.nan)])


def call_of(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, **score) -> AttentionCall:
    values = {"softcap": None, "bias_HR": None, "dropout": None} | score
    return AttentionCall(q, k, v, mask, make_tile_metadata(mask, len(q), len(k)), q.shape[2] ** -0.5, **values)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    return attend_by(documented, call_of(q, k, v, mask))


MASKS = {
    "causal": causal(MIXED),
    "window": causal(MIXED, left=5),
    "window of one": causal(MIXED, left=0),
    "window on both sides": AttentionMask(MIXED, MIXED, left=9, right=3),
    "all to the right": AttentionMask(MIXED, MIXED, left=2, right=None),
    "bidirectional": bidirectional(MIXED),
}


@pytest.mark.parametrize("rows", [48, 60], ids=["", "rows beyond"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_our_masks_are_the_documented_calls(mask: AttentionMask, rows: int) -> None:
    assert_as_exact_as_plain_torch(attend, make_inputs(mask, rows, rows, (4, 2), 16, torch.float32))


def test_without_documents_output_and_gradients_are_zero() -> None:
    mask = causal(int32([0, 0, 0]))
    assert_as_exact_as_plain_torch(attend, make_inputs(mask, 6, 6, (2, 1), 16, torch.float32))


def test_the_arguments_have_no_empty_documents_at_the_end() -> None:
    varlen = varlen_of(causal(MIXED, left=5))
    assert varlen.cu_seqlens.tolist() == [0, 0, 1, 41, 41, 48]
    assert (varlen.longest, varlen.window) == (40, (5, 0))
    assert varlen_of(bidirectional(MIXED)).window == (-1, -1)


def test_calls_that_a_varlen_call_cannot_say_are_refused() -> None:
    q, k = torch.zeros(48, 4, 16, dtype=torch.bfloat16), torch.zeros(48, 2, 16, dtype=torch.bfloat16)
    call = call_of(q, k, k, causal(MIXED))
    assert refusal_of_packed(call) == "does not cover a cpu"
    wide = torch.zeros(48, 4, 12, dtype=torch.bfloat16)
    refused = {
        "a cap": call_of(q, k, k, causal(MIXED), softcap=1.0),
        "a bias": call_of(q, k, k, causal(MIXED), bias_HR=torch.zeros(4, 3)),
        "prefixes": call_of(q, k, k, prefix_lm(MIXED, int32([0, 1, 2, 0, 0, 0, 0]))),
        "keys of other documents than the queries": call_of(q, k, k, cross(MIXED, MIXED.clone())),
        "torch.float32": call_of(q.float(), k.float(), k.float(), causal(MIXED)),
        "heads of 12 channels": call_of(wide, wide, wide, causal(MIXED)),
    }
    for what, one in refused.items():
        assert refusal_of_packed(one) == f"does not cover {what}"


def test_a_package_that_is_not_there_is_named() -> None:
    assert LIBRARIES.keys() == {"flash-attn", "torch-varlen"}
    assert LIBRARIES.keys() < KERNELS.keys()
    assert missing("torch-varlen") == ""
    if missing("flash-attn"):
        assert "install flash-attn 2.8 or newer" in missing("flash-attn")


def test_torch_has_the_documented_arguments() -> None:
    """And calls its operator with our window: on a CPU the call ends at the kernel, which only a GPU has."""
    inputs = make_inputs(causal(MIXED, left=5), 48, 48, (4, 2), 16, torch.float32)
    with pytest.raises(NotImplementedError, match=r"_flash_attention_forward.*CPU"):
        LIBRARIES["torch-varlen"].attend(call_of(inputs.q_THK, inputs.k_SGK, inputs.v_SGK, inputs.mask))
