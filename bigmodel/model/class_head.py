"""The classification head: from the states of a document to its class ([classification]).

In: the last states (T, H), labels and cu_seqlens of a batch. Out: summed loss, loss of each position (of a document's
last one), or the logits of each document (D, C). The label of a document, the number of its class, is at its last
position. Guarantee: a document's logits depend on its own states only. Padding and empty documents have logits, too,
and no loss.

    pooling: (T, H) -> (D, H)   first or last state of a document, or their mean
    linear: logits = pooled @ W                                              Hugging Face's `score`
    bert: logits = tanh(pooled @ A + a) @ W + w                              BertForSequenceClassification
    modernbert: logits = norm(gelu(pooled @ A)) @ W + w                      ModernBertForSequenceClassification

Letters: T positions, D documents, H hidden_size, C classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigmodel.config.settings import ModelSettings
from bigmodel.kernels.linear_cross_entropy import IGNORED, Options
from bigmodel.model.layers import LayerNorm, Linear
from bigmodel.model.loss_groups import by_group


class ClassHead(nn.Module):
    """Takes the place of the output matrix. Of `options` label_smoothing applies, to loss_sum only; so do the class
    weights and the focal factor of [classification]."""

    def __init__(self, settings: ModelSettings, options: Options) -> None:
        super().__init__()
        assert settings.classification, "a classification head needs model settings with classes"
        self.kind, self.pooling = settings.classification.head, settings.classification.pooling
        self.options, self.focal_gamma = options, settings.classification.focal_gamma
        self.plain_sum: Tensor | float = (
            0.0  # of the last loss_sum: without weights and focal factor; 0 if it is the same
        )
        self.z_sum: Tensor | float = 0.0  # of the last loss_sum: sum of logsumexp(logits)^2 over its labels
        classes, width = len(settings.classification.classes), settings.hidden_size
        if self.kind != "linear":
            self.dense = Linear(width, width, bias=self.kind == "bert")
            self.bias = nn.Parameter(torch.zeros(classes))
        if self.kind == "modernbert":
            self.norm = LayerNorm(width, settings.norm_epsilon, bias=settings.norm_bias)
        self.weight = nn.Parameter(torch.empty(classes, width))

    def forward(
        self,
        x_TH: Tensor,
        labels_T: Tensor,
        output: str,
        groups_T: Tensor | None,
        num_loss_groups: int,
        cu_seqlens: Tensor,
        weights_T: Tensor | None = None,
    ) -> Tensor:
        """`weights_T`: of the labels' classes in loss_sum."""
        logits_DC = self.logits(pool(x_TH, cu_seqlens, self.pooling))
        if output == "logits":
            return logits_DC
        labels_D = labels_of(labels_T, cu_seqlens)
        smoothing = self.options.label_smoothing if output == "loss_sum" else 0.0
        losses_D = F.cross_entropy(
            logits_DC, labels_D, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
        )
        weights_D: Tensor | float = 1.0
        if output == "loss_sum" and (self.focal_gamma or weights_T is not None):
            weights_D = 1.0 if weights_T is None else weights_T[last_positions(cu_seqlens)]
            self.plain_sum = losses_D.detach().sum()
            losses_D = focal(losses_D, self.focal_gamma) * weights_D
        losses_T = at_last_positions(losses_D, cu_seqlens, len(labels_T))
        if output == "loss_per_position":
            return losses_T
        loss_sum = losses_D.sum()
        z_D = logits_DC.detach().logsumexp(-1).square()
        self.z_sum = (z_D * weights_D).masked_fill(labels_D == IGNORED, 0.0).sum()
        return loss_sum if groups_T is None else by_group(loss_sum, losses_T.detach(), groups_T, num_loss_groups)

    def logits(self, pooled_DH: Tensor) -> Tensor:
        """(D, C), in fp32 at least."""
        wide = torch.promote_types(pooled_DH.dtype, torch.float32)
        if self.kind == "linear":
            return F.linear(pooled_DH.to(wide), self.weight.to(wide))
        x_DH = self.dense(pooled_DH)
        x_DH = torch.tanh(x_DH) if self.kind == "bert" else self.norm(F.gelu(x_DH))
        return F.linear(x_DH.to(wide), self.weight.to(wide), self.bias.to(wide))


def pool(x_TH: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """(D, H): first state, last state or mean of each document; the mean is summed in fp32 at least.

    >>> x_TH, cu_seqlens = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 2, 3])
    >>> [pool(x_TH, cu_seqlens, pooling)[:, 0].tolist() for pooling in ("first", "last", "mean")]
    [[1.0, 5.0], [3.0, 5.0], [2.0, 5.0]]
    """
    if pooling == "mean":
        wide, lengths_D = torch.promote_types(x_TH.dtype, torch.float32), cu_seqlens.diff().long()
        sums_DH = torch.segment_reduce(x_TH.to(wide), "sum", lengths=lengths_D, axis=0, unsafe=True)
        return (sums_DH / lengths_D.clamp_min(1)[:, None]).to(x_TH.dtype)
    rows_D = cu_seqlens[:-1] if pooling == "first" else cu_seqlens[1:] - 1
    return x_TH[rows_D.long().clamp(0, len(x_TH) - 1)]


def labels_of(labels_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(D,) the label at each document's last position; IGNORED of padding and empty documents."""
    return torch.where(cu_seqlens.diff() > 0, labels_T[last_positions(cu_seqlens)], IGNORED)


def last_positions(cu_seqlens: Tensor) -> Tensor:
    """(D,) the last position of each document; any of an empty one."""
    return (cu_seqlens[1:].long() - 1).clamp_min(0)


def focal(losses_D: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma * -log p of cross-entropies -log p (Lin et al. 2017, without its class weight); gamma 0: as they
    are. At p = 1, where (1 - p)^gamma may have an infinite slope, loss and gradient are 0.

    >>> focal(torch.tensor([0.6931472, 0.0]), 2.0)
    tensor([0.1733, 0.0000])
    """
    if not gamma:
        return losses_D
    wrong_D = -torch.expm1(-losses_D)
    return wrong_D.clamp_min(torch.finfo(losses_D.dtype).tiny) ** gamma * losses_D


def at_last_positions(values_D: Tensor, cu_seqlens: Tensor, count: int) -> Tensor:
    """(T,) a document's value at its last position, 0 elsewhere."""
    row_T = torch.arange(count, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document_T = torch.searchsorted(cu_seqlens, row_T, right=True) - 1
    is_last_T = row_T + 1 == cu_seqlens[document_T + 1]
    return torch.where(is_last_T, values_D[document_T], 0.0)
