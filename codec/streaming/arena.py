"""The states of many streams in one place, and steps of some of them together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from codec.layers.causal import State, leaves, map_state

StepFunction = Callable[[Tensor, State], tuple[Tensor, State]]


class StateArena:
    """One row of state for each of `capacity` places, in memory that stays where it is, and one row for nobody."""

    def __init__(self, like: State, capacity: int) -> None:
        """`like`: a state of one stream, in the form that all of them have."""
        self.spare_place = capacity
        self._form = form_of(like)
        self._rows = map_state(lambda leaf: leaf.new_zeros((capacity + 1, *leaf.shape[1:])), like)
        self.bytes_per_row = sum(leaf.numel() * leaf.element_size() for leaf in leaves(like))

    def fits(self, state: State) -> bool:
        """Whether a state of one stream has the form of the rows."""
        return form_of(state) == self._form

    def put(self, places: Tensor, states: State) -> None:
        """Write these rows; `places` int64 [B]."""
        map_state(lambda rows, new: rows.index_copy_(0, places, new), self._rows, states)

    def get(self, places: Tensor, out: State | None = None) -> State:
        """A copy of these rows, in new memory or in that of `out`."""
        if out is None:
            return map_state(lambda rows: rows.index_select(0, places), self._rows)
        return map_state(lambda rows, kept: torch.index_select(rows, 0, places, out=kept), self._rows, out)

    def places(self, numbers: Sequence[int]) -> Tensor:
        """Numbers of places as `put` and `get` take them."""
        return torch.tensor(numbers, device=next(leaves(self._rows)).device)


class Stepper:
    """Steps of rows of an arena. On a GPU, of a fixed number of rows, recorded once for each length of a step."""

    def __init__(
        self, function: StepFunction, arena: StateArena, compile: Callable[[StepFunction], Any] | None = None
    ) -> None:
        self.function = function if compile is None else cast(StepFunction, compile(function))
        self._arena = arena
        # What compiles may record graphs itself, and records would then lie in records.
        self._records = compile is None
        self._recordings: dict[torch.Size, _Recording] = {}

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether the last step was a recorded one."""
        return bool(self._recordings)

    def step(self, inputs: Tensor, places: Sequence[int], tile_rows: int) -> Tensor:
        """Inputs [B, ...] of the streams at these places, B <= `tile_rows` -> outputs [B, ...], in memory of their own.

        Inputs are codes, or audio. Both lie on the CPU.
        """
        rows = self._arena.places(places)
        if rows.is_cuda:
            num_missing = tile_rows - len(inputs)
            nothing = inputs.new_full((num_missing, *inputs.shape[1:]), 0 if inputs.is_floating_point() else -1)
            filled = self._arena.places([*places, *[self._arena.spare_place] * num_missing])
            return self._filled_step(torch.cat([inputs, nothing]).to(rows.device), filled)[: len(inputs)].cpu()
        outputs, after = self.function(inputs, self._arena.get(rows))
        self._arena.put(rows, after)
        return outputs

    def _filled_step(self, inputs: Tensor, places: Tensor) -> Tensor:
        if self._records and inputs.shape not in self._recordings:
            try:
                self._recordings[inputs.shape] = _Recording(self.function, inputs, self._arena.get(places))
            except RuntimeError as error:
                warnings.warn(f"steps of this codec are not recorded as CUDA graphs: {error}", stacklevel=2)
                self._records, self._recordings = False, {}
        if not self._records:
            outputs, after = self.function(inputs, self._arena.get(places))
        else:
            outputs, after = self._recordings[inputs.shape].replay(inputs, lambda out: self._arena.get(places, out))
        self._arena.put(places, after)
        return outputs


class _Recording:
    """A step as a CUDA graph, with the memory that it reads and writes."""

    def __init__(self, function: StepFunction, inputs: Tensor, state: State) -> None:
        self._inputs, self._state = inputs.clone(), state
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is done at the first call only must not be recorded
            for _ in range(2):
                function(self._inputs, self._state)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs, self._after = function(self._inputs, self._state)

    def replay(self, inputs: Tensor, load_state: Callable[[State], object]) -> tuple[Tensor, State]:
        """Outputs, and states that the next replay overwrites."""
        self._inputs.copy_(inputs)
        load_state(self._state)
        self._graph.replay()
        return self._outputs.clone(), self._after


def form_of(state: State) -> object:
    """What states must have in common to be rows of one: the tree, and shapes and types of its tensors."""
    if isinstance(state, Tensor):
        return state.shape[1:], state.dtype
    return tuple(form_of(part) for part in state)
