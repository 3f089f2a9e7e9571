"""What takes turns: ours, loops of single operations as they are, compiled and in a CUDA graph, peers, and floors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec.kernels.residual_search import available_impls, rvq_search, search_with
from tools.quantizer_speed.cases import Case, projected
from tools.quantizer_speed.peers import PEERS

KINDS = ("ours", "eager", "compile", "graph", "peers")

_CPU_SCORES = 2**19  # of a block: 2 MB, which caches hold
_GPU_ROWS = 2**14  # enough for a product to reach its full rate


@dataclass(frozen=True)
class Candidate:
    """Something to time: `call`, with one of `inputs` after the other. Its time is to be multiplied by `scale`."""

    name: str
    call: Callable[[Tensor], Any]
    inputs: Sequence[Tensor]
    scale: float = 1.0


@dataclass(frozen=True)
class Field:
    """All that takes turns on one case, ours first, and what is not there, with the reasons.

    Encoders turn latents [B, D, F] into codes [B, K, F], decoders do the reverse.
    """

    encoders: list[Candidate]
    decoders: list[Candidate]
    products: list[Candidate]
    reads: list[Candidate]
    missing: dict[str, str]


def field(case: Case, kinds: Sequence[str] = KINDS) -> Field:
    """Everything of these kinds that there is for a case; "ours" is there always. Each was called once."""
    codes = [case.quantizer.encode(latents).contiguous() for latents in case.latents]
    encoders = [Candidate("ours", case.quantizer.encode, case.latents)]
    decoders = [Candidate("ours", case.quantizer.decode, codes)]
    missing: dict[str, str] = {}
    for kind in KINDS:
        for name, make in _OFFERS[kind](case) if kind in kinds or kind == "ours" else []:
            try:
                encode, decode = make()
                encode(case.latents[0])
                if decode:
                    decode(codes[0])
            except Exception as error:  # whatever another's code, or a compiler, raises
                missing[name] = _first_line(error)
            else:
                encoders.append(Candidate(name, encode, case.latents))
                decoders.extend([Candidate(name, decode, codes)] if decode else [])
    return Field(encoders, decoders, list(_products(case)), list(reads(num_bytes(case), case.device)), missing)


# What may be there: a name, and what makes a call to encode and, where there is a way of its own, one to decode.
_Call = Callable[[Tensor], Tensor]
_Offer = tuple[str, Callable[[], tuple[_Call, _Call | None]]]


def _searches(case: Case) -> Iterator[_Offer]:
    def search(latents: Tensor, *, impl: str) -> Tensor:
        return _as_codes(rvq_search(case.rows(latents), case.tables, impl=impl), latents)

    def compiled(latents: Tensor) -> Tensor:
        with search_with("numba"):
            return case.quantizer.encode(latents)

    if "numba" in available_impls(case.device.type):
        yield "ours, compiled", functools.partial(_pair, compiled, None)
    for impl in available_impls(case.device.type):
        yield f"search: {impl}", functools.partial(_pair, functools.partial(search, impl=impl), None)


def _loops(case: Case) -> Iterator[_Offer]:
    yield "eager loop", functools.partial(_pair, _loop(case, _by_argmax), case.eager_decode)
    yield "eager loop, max", functools.partial(_pair, _loop(case, _by_max), None)


def _compiled(case: Case) -> Iterator[_Offer]:
    def make() -> tuple[_Call, _Call]:
        torch.compiler.reset()
        encode = torch.compile(_loop(case, _by_argmax), fullgraph=True, dynamic=False)
        return encode, torch.compile(case.eager_decode, fullgraph=True, dynamic=False)

    yield "torch.compile", make


def _graphs(case: Case) -> Iterator[_Offer]:
    if case.device.type == "cuda":
        latents = case.latents[0]
        codes = case.quantizer.encode(latents).contiguous()
        calls: dict[str, tuple[_Call, _Call]] = {
            "eager loop": (_loop(case, _by_argmax), case.eager_decode),
            "ours": (case.quantizer.encode, case.quantizer.decode),
        }
        for name, (encode, decode) in calls.items():
            yield f"{name}, CUDA graph", functools.partial(_graph_pair, (encode, latents), (decode, codes))


def _peers(case: Case) -> Iterator[_Offer]:
    for name, kind, peer in PEERS:
        if kind == case.kind:
            yield name, functools.partial(peer, case)


_OFFERS: dict[str, Callable[[Case], Iterator[_Offer]]] = {
    "ours": _searches,
    "eager": _loops,
    "compile": _compiled,
    "graph": _graphs,
    "peers": _peers,
}


def _pair(encode: _Call, decode: _Call | None) -> tuple[_Call, _Call | None]:
    return encode, decode


def _loop(case: Case, pick: _Call) -> _Call:
    """What gives codes by one product, one choice and one subtraction for each code row, after the projections."""
    stages, projections = case.stages, case.projections

    def search(latents: Tensor) -> Tensor:
        residual_ND, codes = projected(latents, projections).clone(), []
        for dims, offsets_C, entries_dC, first, table_Cw in stages:
            codes_N = pick(torch.addmm(offsets_C, residual_ND[:, dims], entries_dC))
            residual_ND[:, first : first + table_Cw.shape[1]] -= table_Cw[codes_N]
            codes.append(codes_N)
        return _as_codes(torch.stack(codes, dim=1), latents)

    return search


def _as_codes(codes_NK: Tensor, latents: Tensor) -> Tensor:
    return codes_NK.view(latents.shape[0], latents.shape[2], -1).transpose(1, 2)


def _by_argmax(scores_NC: Tensor) -> Tensor:
    return scores_NC.argmax(1)


def _by_max(scores_NC: Tensor) -> Tensor:
    return scores_NC.max(1).indices


def flops(case: Case) -> float:
    """Of the products alone: two for each latent dim and output, and for each dim and entry of a codebook."""
    return 2.0 * case.num_rows * sum(weight.numel() for weight in _weights(case))


def num_bytes(case: Case) -> int:
    """Of codebooks and projections."""
    return sum(4 * weight.numel() for weight in _weights(case))


def reads(size_bytes: int, device: torch.device) -> Iterator[Candidate]:
    """Reading that much memory, again and again, in several ways; the best is the floor."""
    memory = torch.ones(max(1, size_bytes // 512), 128, device=device)
    scale = size_bytes / (4 * memory.numel())
    vector, out = torch.ones(128, device=device), torch.empty(len(memory), device=device)
    yield Candidate("sum", torch.sum, [memory], scale)
    yield Candidate("product with a vector", lambda memory: torch.mv(memory, vector, out=out), [memory], scale)
    if device.type == "cpu":
        arrays = memory.numpy(), vector.numpy(), out.numpy()
        yield Candidate("numpy's product with a vector", lambda _: np.dot(*arrays), [memory], scale)


def _weights(case: Case) -> list[Tensor]:
    """What rows of latents are multiplied with, each [out, in]."""
    return [weight for weight, _ in case.projections] + list(case.tables.entries_KCd)


def _products(case: Case) -> Iterator[Candidate]:
    """The products of a case, and nothing else: all rows at once, and in blocks whose results stay in cache.

    A product of few rows waits for memory. That is the other floor, so here it has as many rows as a block, and of its
    time that part which the few rows have of the block.
    """
    num_rows, is_cpu = case.num_rows, case.device.type == "cpu"
    block_rows = max(16, _CPU_SCORES // case.tables.codebook_size) if is_cpu else _GPU_ROWS
    for rows in sorted({min(num_rows, block_rows), num_rows}) if is_cpu else [num_rows]:
        at_once = max(rows, block_rows)
        factors = []
        for weight in _weights(case):
            x = torch.ones(at_once, weight.shape[1], device=weight.device)
            factors.append((x, weight.T, torch.empty(at_once, len(weight), device=weight.device)))
        num_blocks = num_rows // at_once or 1
        name = f"{num_blocks} x {at_once} rows"
        call = functools.partial(_multiply, factors, num_blocks)
        yield Candidate(name, call, case.latents[:1], num_rows / (num_blocks * at_once))


def _multiply(factors: list[tuple[Tensor, Tensor, Tensor]], num_times: int, _unused: Tensor) -> None:
    for _time in range(num_times):
        for x, weight_T, out in factors:
            torch.mm(x, weight_T, out=out)


def _graph_pair(encode: tuple[_Call, Tensor], decode: tuple[_Call, Tensor]) -> tuple[_Call, _Call]:
    return _in_graph(*encode), _in_graph(*decode)


def _in_graph(call: _Call, example: Tensor) -> _Call:
    """A call in a CUDA graph. Each replay begins with copying what it is given to where the graph reads."""
    given = example.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(given)

    def replay(value: Tensor) -> Tensor:
        given.copy_(value)
        graph.replay()
        return captured

    return replay


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:160]
