"""Packed attention by kernels of other libraries, for `attention(kernel=...)`.

    flash-attn     FlashAttention-2: flash_attn_varlen_func of the package flash-attn, from 2.8 on
    torch-varlen   torch.nn.attention.varlen: the FlashAttention that torch is built with

In: an `AttentionCall`. Out: the output (T, H, K), differentiable. Both know packed documents by cu_seqlens, align the
last query of a document with its last key, and count a window as ours does: `left` keys before the aligned one and
`right` after it, both included, -1 for no limit. So they cover documents that attend to themselves, causal or not, with
or without a window, with grouped heads, in bf16 and fp16; no prefixes, cross-attention, bias, cap or dropout.

Guarantees: rows beyond the last of cu_seqlens are zero, have zero gradients and influence nothing, although the
libraries do not write them; backward passes are the deterministic ones. Costs: one wait for the device per batch, for
the longest document; q, k, v and the output are copied once; torch.compile stops here.

Status: never run. There was no GPU; tests hold the translation to the documented calls, tests/gpu the rest.

Shape suffixes: T rows, H query heads, G key heads, K channels of a head.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bigmodel.kernels.attention_kernels import AttentionCall, AttentionKernel
from bigmodel.kernels.mask import AttentionMask

OLDEST_FLASH_ATTN = (2, 8)
OLDEST_TORCH = (2, 12)  # its varlen_attn takes scale, window_size and enable_gqa


class Varlen(NamedTuple):
    """Arguments of a varlen call. longest: tokens of the longest document, 0 if there is none."""

    cu_seqlens: Tensor  # without empty documents at the end
    longest: int
    window: tuple[int, int]  # (left, right), -1: no limit


# q, k, v, the arguments, the scale -> out, in which rows beyond the last of cu_seqlens may hold anything.
VarlenFunction = Callable[[Tensor, Tensor, Tensor, Varlen, float], Tensor]


def varlen_of(mask: AttentionMask) -> Varlen:
    """The arguments for a mask of documents that attend to themselves. Waits for the device once per cu_seqlens."""
    cu_seqlens = mask.cu_seqlens_q
    if cu_seqlens not in _EXTENTS:
        lengths = cu_seqlens.diff()
        number = torch.arange(1, len(cu_seqlens), device=cu_seqlens.device, dtype=lengths.dtype)
        longest, documents = torch.stack([lengths.max(), torch.where(lengths > 0, number, 0).max()]).tolist()
        _EXTENTS[cu_seqlens] = longest, documents
    longest, documents = _EXTENTS[cu_seqlens]
    left, right = (-1 if side is None else side for side in (mask.left, mask.right))
    return Varlen(cu_seqlens[: documents + 1], longest, (left, right))


_EXTENTS: Any = WeakTensorKeyDictionary()  # cu_seqlens -> longest document, place of the last one


@torch.compiler.disable
def attend_by(function: VarlenFunction, call: AttentionCall) -> Tensor:
    """The call by a varlen function."""
    varlen = varlen_of(call.mask)
    row_T = torch.arange(len(call.q_THK), device=call.q_THK.device)
    inside_T11 = (row_T < call.mask.cu_seqlens_q[-1])[:, None, None]
    # `where`, not a product: it stops NaN, forwards and in gradients.
    q_THK, k_TGK, v_TGK = (torch.where(inside_T11, rows, 0.0) for rows in (call.q_THK, call.k_SGK, call.v_SGK))
    if not varlen.longest:
        return q_THK + k_TGK.sum() + v_TGK.sum()  # zeros, with a gradient of zeros
    return torch.where(inside_T11, function(q_THK, k_TGK, v_TGK, varlen, call.scale), 0.0)


def refusal_of_packed(call: AttentionCall) -> str | None:
    """Why a call is not covered."""
    mask, (_, _, channels) = call.mask, call.q_THK.shape
    refused = {
        "a bias": call.bias_HR is not None,
        "a cap": call.softcap is not None,
        "dropout": call.dropout is not None,
        "prefixes": mask.key_prefix is not None or mask.query_prefix is not None,
        "keys of other documents than the queries": mask.cu_seqlens_q is not mask.cu_seqlens_k,
        f"{call.q_THK.dtype}": call.q_THK.dtype not in (torch.bfloat16, torch.float16),
        f"heads of {channels} channels": channels > 256 or channels % 8 > 0,
        f"a {call.q_THK.device.type}": not call.q_THK.is_cuda,
    }
    return next((f"does not cover {what}" for what, is_so in refused.items() if is_so), None)


def missing(name: str) -> str:
    """Why a library cannot be used here; empty: it can."""
    if name == "torch-varlen" and tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {torch.__version__} is too old; install 2.12 or newer"
    if name == "flash-attn":
        try:
            version = importlib.metadata.version("flash-attn")
        except importlib.metadata.PackageNotFoundError:
            return "the package flash-attn is not installed; install flash-attn 2.8 or newer, built for this torch"
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_FLASH_ATTN:
            return f"flash-attn {version} is too old; install 2.8 or newer"
    return ""


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    offsets, longest = (varlen.cu_seqlens,) * 2, (varlen.longest,) * 2
    is_causal = varlen.window[1] == 0
    return flash_attn_varlen_func(
        q,
        k,
        v,
        *offsets,
        *longest,
        softmax_scale=scale,
        causal=is_causal,
        window_size=varlen.window,
        deterministic=True,
    )


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> Tensor:
    out: Tensor = _Deterministic.apply(q, k, v, varlen, scale)
    return out


class _Deterministic(torch.autograd.Function):
    """torch's varlen attention. Its backward adds in any order, unless torch is told to be deterministic."""

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        offsets, longest = (varlen.cu_seqlens,) * 2, (varlen.longest,) * 2
        with torch.enable_grad():
            context.rows = tuple(rows.detach().requires_grad_() for rows in (q, k, v))
            more = {"scale": scale, "window_size": varlen.window, "enable_gqa": q.shape[1] != k.shape[1]}
            context.out = varlen_attn(*context.rows, *offsets, *longest, **more)
        return context.out.detach()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            return *torch.autograd.grad(context.out, context.rows, gradients[0], retain_graph=True), None, None
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _by(function: VarlenFunction) -> AttentionKernel:
    return AttentionKernel(lambda call: attend_by(function, call), refusal_of_packed)


LIBRARIES = {"flash-attn": _by(_flash_attn), "torch-varlen": _by(_torch_varlen)}
