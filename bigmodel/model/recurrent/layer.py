"""A recurrent layer: states of packed documents in, states out, by our scan or by torch's kernels.

In: rows in the order of a `Timeline`, first states or zeros. Out: the states of all rows after dropout, and the last
state of each document. A GPU runs torch.lstm and the like (cuDNN), which have no peepholes; a CPU, and an lstm with
peepholes anywhere, our scan, in fp32 at least. Both read the same parameters, torch's without its second bias where
that adds nothing.

Letters in tensor names: T rows, N documents, H hidden_size, D gates * H.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigmodel.config.recurrent_settings import GATES
from bigmodel.config.settings import ModelSettings
from bigmodel.model.layers import dropout
from bigmodel.model.recurrent.scans import GruScan, LstmScan, RnnScan
from bigmodel.model.recurrent.timeline import Timeline

State = tuple[Tensor, ...]  # h, and of an lstm c: (N, H) each

# ZeRO keeps parameters in its own order, so cuDNN copies the few weights of a layer into its own, and says so.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk of memory")


class Layer(nn.Module):
    """Gates are in torch's order: lstm i, f, g, o; gru r, z, n."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.cell, self.layer, self.dropout = settings.cell, layer, settings.dropout
        self.every = settings.backpropagation_tokens
        width, rows = settings.hidden_size, GATES[settings.cell] * settings.hidden_size
        self.input_weight = nn.Parameter(torch.empty(rows, width))
        self.state_weight = nn.Parameter(torch.empty(rows, width))
        self.bias = nn.Parameter(torch.empty(rows))
        self.candidate_bias = nn.Parameter(torch.empty(width)) if self.cell == "gru" else None
        self.peepholes = nn.Parameter(torch.empty(3 * width)) if settings.peepholes else None

    def forward(
        self, x_TH: Tensor, line: Timeline, seeds_T: Tensor | None = None, first: State | None = None
    ) -> tuple[Tensor, State]:
        """seeds_T: dropout seeds of the rows in order; only training needs them."""
        kind = x_TH.dtype
        if first is None:
            zeros_NH = x_TH.new_zeros(line.sizes[0], x_TH.shape[1])
            first = (zeros_NH, zeros_NH) if self.cell == "lstm" else (zeros_NH,)
        if x_TH.device.type == "cuda" and self.peepholes is None:
            h_TH, last = self.by_torch(x_TH, line, first)
        else:
            states = self.by_scan(x_TH, line, first)
            h_TH, last = states[0].to(kind), tuple(state[line.last_N].to(kind) for state in states)
        if self.training and self.dropout:
            assert seeds_T is not None, "dropout of a recurrent layer needs seeds"
            h_TH = dropout(h_TH, self.dropout, seeds_T, salt=self.layer)
        return h_TH, last

    def by_scan(self, x_TH: Tensor, line: Timeline, first: State) -> State:
        """h, and of an lstm c, of all rows, in fp32 at least. On the meta device, which counts the bytes of a GPU, it
        stands for cuDNN, which keeps about as much in the precision of x."""
        is_cudnn = x_TH.is_meta and self.peepholes is None
        kind = x_TH.dtype if is_cudnn else torch.promote_types(x_TH.dtype, torch.float32)
        a_TD = F.linear(x_TH.to(kind), self.input_weight.to(kind), self.bias.to(kind))
        weight_DH, first = self.state_weight.to(kind), tuple(state.to(kind) for state in first)
        if self.cell == "rnn":
            return (RnnScan.apply(a_TD, weight_DH, *first, line.sizes, self.every),)
        if self.cell == "gru":
            assert self.candidate_bias is not None
            return (GruScan.apply(a_TD, weight_DH, self.candidate_bias.to(kind), *first, line.sizes, self.every),)
        peepholes = None if self.peepholes is None else self.peepholes.to(kind).view(3, -1)
        return LstmScan.apply(a_TD, weight_DH, peepholes, *first, line.sizes, self.every)

    def by_torch(self, x_TH: Tensor, line: Timeline, first: State) -> tuple[Tensor, State]:
        """The same by torch's kernels: h of all rows, and the last state of each document."""
        every, steps = self.every or len(line.sizes), len(line.sizes)
        edges = [*line.starts, len(x_TH)]
        states, outs, lasts = first, list[Tensor](), list[State]()
        for begin in range(0, steps, every):
            end = min(begin + every, steps)
            alive = line.sizes[begin]
            states = tuple(state[:alive].detach() if begin else state for state in states)
            out_TH, states = self._segment(x_TH[edges[begin] : edges[end]], line.sizes[begin:end], states)
            outs.append(out_TH)
            ended = line.sizes[end] if end < steps else 0
            lasts.insert(0, tuple(state[ended:] for state in states))  # documents that end here, shorter ones first
        return torch.cat(outs), tuple(torch.cat(parts) for parts in zip(*lasts, strict=True))

    def _segment(self, x_TH: Tensor, sizes: list[int], first: State) -> tuple[Tensor, State]:
        zeros_D = torch.zeros_like(self.bias)
        if self.candidate_bias is not None:
            zeros_D = torch.cat((zeros_D[: 2 * len(self.candidate_bias)], self.candidate_bias))
        weights = [self.input_weight, self.state_weight, self.bias, zeros_D]
        how = (weights, True, 1, 0.0, self.training, False)  # biases, layers, dropout, training, bidirectional
        steps, begin = torch.tensor(sizes), [state[None].contiguous() for state in first]
        if self.cell == "lstm":
            out_TH, *last = torch.lstm(x_TH, steps, begin, *how)
        else:
            out_TH, *last = (torch.gru if self.cell == "gru" else torch.rnn_tanh)(x_TH, steps, begin[0], *how)
        return out_TH, tuple(state[0] for state in last)
