"""Plain forms of what the library does to be exact or fast, for the time in which a graph is traced.

Rows are not padded for a product, codes are not checked, nothing is written in place, a stack of LSTM layers is made of
ONNX's own operators, and the search does not bound what it rounds. It keeps its definition
(`codec.kernels.residual_search`): a choice in float64 for residuals in float32, and the lowest index of a tie; but it
makes the choice among the four entries that are nearest in float32. So the codes are those of the library as long as
the latents are, and no five entries lie within what float32 rounds. The rule for what is no number is left out.

Letters: B batch, C channels or entries of a codebook, T samples, N rows of latents, D dims, d dims of a codebook, K
rows of codes, c candidates.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from codec.kernels.kept import Kept
from codec.kernels.residual_search import rvq_decode, rvq_search
from codec.kernels.row_linear import pad_rows, row_linear
from codec.kernels.search_tables import SearchTables, tie_bounds
from codec.layers.causal import State, leaves
from codec.layers.conv import ConvTranspose, SignalLayer
from codec.layers.recurrent import LSTM
from codec.models.interface import StreamableCodec
from codec.models.voice import VoicedCodec
from codec.quantizers.interface import Quantizer

_NUM_CANDIDATES = 4


def plain_copy(codec: StreamableCodec) -> StreamableCodec:
    """A copy to trace: nothing cached, no gradients, and LSTM layers made of operators."""
    copied = copy.deepcopy(codec).eval().requires_grad_(False)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LSTM):
                setattr(parent, name, _LSTMOperators(child))
    return copied


@contextlib.contextmanager
def plain_forms() -> Iterator[None]:
    """Within it, the library uses the plain forms, wherever it imported the others. It changes the whole process."""
    with contextlib.ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("codec.")]:
            for name, value in list(vars(module).items()):
                for function, form in _FORMS:
                    if value is function:
                        stack.enter_context(mock.patch.object(module, name, form))
        stack.enter_context(mock.patch.object(ConvTranspose, "step", _transposed_step))
        stack.enter_context(mock.patch.object(Quantizer, "check_codes"))
        stack.enter_context(mock.patch.object(VoicedCodec, "checked_global_codes", lambda codec, codes, size: codes))
        yield


@contextlib.contextmanager
def kept_values() -> Iterator[None]:
    """Within it, tables that were made before are taken as they are, whatever tracing puts in place of weights."""

    def get(kept: Kept[Any], sources: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        assert kept._kept is not None
        return kept._kept[2]

    with mock.patch.object(Kept, "get", get):
        yield


def _row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def _pad_rows(rows: Tensor, *weights: Tensor) -> Tensor:
    return rows


class _Constants:
    """What the search reads of each code row: entries, float64 offsets, widths of ties, and what a choice takes."""

    def __init__(self, tables: SearchTables) -> None:
        self.entries_KCd = [entries_Cd.clone() for entries_Cd in tables.entries_KCd]
        self.offsets_KC = [offsets_C.clone() for offsets_C in tables.exact_offsets_KC]
        slopes_K, constants_K = tie_bounds(tables)
        self.ties_K = list(zip(slopes_K.tolist(), constants_K.tolist(), strict=True))
        # Entries that are taken themselves are in the file once.
        self.takes = [
            (first, own_Cd if torch.equal(table_Cw, own_Cd) else table_Cw.clone())
            for (first, table_Cw), own_Cd in zip(tables.takes, self.entries_KCd, strict=True)
        ]


def _search(latents_ND: Tensor, tables: SearchTables, *, num_rows: int | None = None) -> Tensor:
    constants = tables.prepared("graph", _Constants)
    num_candidates = min(_NUM_CANDIDATES, tables.codebook_size)
    residual_ND, codes_KN = latents_ND, []
    for row in range(num_rows or tables.num_rows):
        entries_Cd, offsets_C = constants.entries_KCd[row], constants.offsets_KC[row]
        chain_Nd = residual_ND[:, tables.slice_of(row)]
        rough_NC = chain_Nd @ entries_Cd.T + offsets_C.float()
        candidates_Nc = rough_NC.topk(num_candidates).indices
        exact_Nd = chain_Nd.double()
        products_Nc = (F.embedding(candidates_Nc, entries_Cd).double() * exact_Nd[:, None]).sum(2)
        scores_Nc = products_Nc + F.embedding(candidates_Nc, offsets_C[:, None])[:, :, 0]
        slope, least = constants.ties_K[row]
        tie_N1 = slope * exact_Nd.square().sum(1, keepdim=True).sqrt() + least
        is_best_Nc = scores_Nc >= scores_Nc.amax(1, keepdim=True) - tie_N1
        codes_N = torch.where(is_best_Nc, candidates_Nc, tables.codebook_size).amin(1)
        codes_KN.append(codes_N)
        first, table_Cw = constants.takes[row]
        taken_Nw = F.embedding(codes_N, table_Cw)
        behind = tables.num_dims - first - table_Cw.shape[1]
        residual_ND = residual_ND - (F.pad(taken_Nw, (first, behind)) if first or behind else taken_Nw)
    return torch.stack(codes_KN, dim=1)


def _decode(codes_NK: Tensor, codebooks_KCd: Tensor, *, num_groups: int = 1) -> Tensor:
    parts = []
    for group in range(num_groups):
        sums_Nd = []
        for row in range(group, codes_NK.shape[1], num_groups):
            codes_N = codes_NK[:, row]
            sums_Nd.append(F.embedding(codes_N.clamp_min(0), codebooks_KCd[row]) * (codes_N >= 0)[:, None])
        parts.append(sum(sums_Nd[1:], start=sums_Nd[0]))
    return torch.cat(parts, dim=1)


_FORMS: list[tuple[Any, Callable[..., Tensor]]] = [
    (row_linear, _row_linear),
    (pad_rows, _pad_rows),
    (rvq_search, _search),
    (rvq_decode, _decode),
]


def _transposed_step(layer: ConvTranspose, x: Tensor, state: State) -> tuple[Tensor, State]:
    assert isinstance(state, Tensor)
    y = F.conv_transpose1d(x, layer.weight, stride=layer.stride)
    y = torch.cat([y[:, :, : layer.overlap] + state, y[:, :, layer.overlap :]], dim=2)
    num_done = x.shape[2] * layer.stride
    return y[:, :, :num_done] + layer.bias[:, None], y[:, :, num_done:]


class _LSTMOperators(SignalLayer):
    """The LSTM layer, its state and all, with one operator for each layer of its stack; PyTorch's would be unrolled.

    Source: https://onnx.ai/onnx/operators/onnx__LSTM.html
    """

    def __init__(self, layer: LSTM) -> None:
        super().__init__()
        self.hidden_size = layer.lstm.hidden_size
        self.stack = []
        for number in range(layer.lstm.num_layers):
            own = [getattr(layer.lstm, f"{name}_l{number}") for name in _LSTM_WEIGHTS]
            # PyTorch has the gates input, forget, cell, output; ONNX has input, output, forget, cell.
            from_input, from_hidden, *biases = (
                torch.cat([values.chunk(4)[gate] for gate in (0, 3, 1, 2)])[None] for values in own
            )
            self.stack.append((from_input, from_hidden, torch.cat(biases, dim=1)))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        before = [part.transpose(0, 1) for part in leaves(state)]  # hidden and cell values, [layers, B, C]
        y, after = x.permute(2, 0, 1), []
        for number, (from_input, from_hidden, biases) in enumerate(self.stack):
            given = [part[number : number + 1] for part in before]
            y, *new = torch.onnx.ops.symbolic_multi_out(
                "LSTM",
                [y, from_input, from_hidden, biases, None, *given],
                {"hidden_size": self.hidden_size},
                dtypes=(y.dtype,) * 3,
                shapes=((y.shape[0], 1, y.shape[1], self.hidden_size), given[0].shape, given[1].shape),
                version=14,
            )
            y = y[:, 0]
            after.append(new)
        hidden, cell = (torch.cat(parts).transpose(0, 1) for parts in zip(*after, strict=True))
        return y.permute(1, 2, 0) + x, (hidden, cell)


_LSTM_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
