"""Steps of a codec as ONNX graphs: states go in and come out as named tensors, and the quantizer is inside.

Letters: B batch, C channels, T samples, K rows of codes, L global codes, n frames of a step.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from codec.layers.causal import State, leaves, map_state
from codec.models.interface import Codec, StreamableCodec
from codec.models.voice import VoicedCodec, voiced
from tools.onnx_export.plain import kept_values, plain_copy, plain_forms

_EXAMPLE_BATCH, _EXAMPLE_FRAMES = 2, 3  # of graphs of any sizes; neither 0 nor 1, which would be taken for constants

_Step = Callable[[StreamableCodec, Tensor, State], tuple[Tensor, State]]


@dataclass(frozen=True)
class Shape:
    """How many rows of codes, how many frames in a step (None: any number), and which opset of ONNX."""

    num_quantizers: int
    num_frames: int | None
    opset: int


@dataclass(frozen=True)
class Leaf:
    """A tensor of a state: the graph's input `name` and its output `name.next`; `initial` [1, ...] at the beginning."""

    name: str
    initial: Tensor


@dataclass(frozen=True)
class Graph:
    """A graph that takes and gives one tensor, and the state that goes with it. `program` can `save` itself."""

    program: Any
    input_name: str
    output_name: str
    leaves: tuple[Leaf, ...]


def encoder_graph(codec: StreamableCodec, shape: Shape) -> Graph:
    """Audio float32 [B, C, n * hop] and a state -> codes int64 [B, K, n] and the next state.

    ValueError for a codec whose steps withhold frames, or change the shape of a state.
    """

    def step(codec: StreamableCodec, audio: Tensor, state: State) -> tuple[Tensor, State]:
        return codec.encode_step(audio, state, num_quantizers=shape.num_quantizers)

    num_samples = (shape.num_frames or _EXAMPLE_FRAMES) * codec.hop_length
    audio = torch.zeros(_EXAMPLE_BATCH, codec.num_channels, num_samples)
    return _step_graph(codec, step, ("audio", "codes", "encoder"), codec.encode_init, audio, shape)


def decoder_graph(codec: StreamableCodec, shape: Shape) -> Graph:
    """Codes int64 [B, K, n], -1 for absent ones, and a state -> audio float32 [B, C, n * hop] and the next state.

    ValueError as for `encoder_graph`. Of codecs with global codes, the initial state is that of a voice of zeros.
    """

    def step(codec: StreamableCodec, codes: Tensor, state: State) -> tuple[Tensor, State]:
        return codec.decode_step(codes, state)

    def first_state(batch_size: int) -> State:
        if not isinstance(codec, VoicedCodec):
            return codec.decode_init(batch_size)
        return codec.decode_init(batch_size, torch.zeros(batch_size, codec.num_global_codes, dtype=torch.int64))

    codes = torch.zeros(_EXAMPLE_BATCH, shape.num_quantizers, shape.num_frames or _EXAMPLE_FRAMES, dtype=torch.int64)
    return _step_graph(codec, step, ("codes", "audio", "decoder"), first_state, codes, shape)


def voice_graph(codec: StreamableCodec, decoder: Graph, *, opset: int) -> tuple[Any, list[str]]:
    """Global codes int64 [1, L] -> what of the decoder's first state depends on them: the program, and those leaves."""
    voices = torch.zeros(2, codec.num_global_codes, dtype=torch.int64)
    voices[1] = voiced(codec).global_codebook_size - 1
    filled = _filled(codec.decode_init(2, voices))
    places = [place for place, leaf in enumerate(filled) if not torch.equal(leaf[0], leaf[1])]
    names = [decoder.leaves[place].name for place in places]

    class VoiceGraph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codec = plain_copy(codec)

        def forward(self, global_codes: Tensor) -> tuple[Tensor, ...]:
            state = _filled(self.codec.decode_init(1, global_codes))
            return tuple(state[place] for place in places)

    return _exported(VoiceGraph(), (voices[:1],), ({},), ["global_codes"], names, opset), names


def speaker_graph(codec: StreamableCodec, *, opset: int) -> Any:
    """A whole reference float32 [1, C, T], of at most `voice_samples` samples, -> global codes int64 [1, L]."""

    class SpeakerGraph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codec = voiced(plain_copy(codec))

        def forward(self, audio: Tensor) -> Tensor:
            latents = self.codec.hear_voice(self.codec.levelled(audio)).latents
            return self.codec.voice_quantizer.encode(latents)[:, 0]

    audio = torch.zeros(1, codec.num_channels, voiced(codec).voice_samples)
    shapes = ({2: torch.export.Dim("samples", min=1)},)
    return _exported(SpeakerGraph(), (audio,), shapes, ["audio"], ["global_codes"], opset)


def _step_graph(
    codec: StreamableCodec,
    step: _Step,
    names: tuple[str, str, str],
    first_state: Callable[[int], State],
    x: Tensor,
    shape: Shape,
) -> Graph:
    (input_name, output_name, side), state = names, first_state(len(x))
    y, after = step(codec, x, state)
    per_frame, given_per_frame = (1, codec.hop_length) if x.is_floating_point() else (codec.hop_length, 1)
    is_whole = y.shape[2] * given_per_frame == x.shape[2] * per_frame
    if not is_whole or [leaf.shape for leaf in leaves(state)] != [leaf.shape for leaf in leaves(after)]:
        raise ValueError(
            f"{codec.name or type(codec).__name__} withholds the first frames of a stream, until it knows what it "
            f"mirrors before the beginning (pad_mode='reflect'): its states change shape, which a graph's cannot"
        )

    class StepGraph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codec = plain_copy(codec)

        def forward(self, x: Tensor, *filled: Tensor) -> tuple[Tensor, ...]:
            given = iter(filled)
            # A leaf without values never gets any, and is none of the inputs.
            before = map_state(
                lambda leaf: next(given) if _has_values(leaf) else leaf.new_zeros(x.shape[0], *leaf.shape[1:]), state
            )
            y, after = step(self.codec, x, before)
            return y, *_filled(after)

    first = _filled(first_state(1))
    parts = tuple(Leaf(*pair) for pair in zip(_names(codec, first_state, side), first, strict=True))
    batch, frames = torch.export.Dim("batch", min=1), torch.export.Dim("frames", min=1)
    sizes_of_x = {0: batch} if shape.num_frames else {0: batch, 2: given_per_frame * frames}
    program = _exported(
        StepGraph(),
        # Copies: where two leaves are one tensor, tracing would take the inputs for the same one, too.
        (x, *(leaf.clone() for leaf in _filled(state))),
        (sizes_of_x, tuple({0: batch} for _ in parts)),
        [input_name, *(leaf.name for leaf in parts)],
        [output_name, *(f"{leaf.name}.next" for leaf in parts)],
        shape.opset,
    )
    return Graph(program, input_name, output_name, parts)


def _has_values(leaf: Tensor) -> bool:
    return 0 not in leaf.shape[1:]


def _filled(state: State) -> list[Tensor]:
    return [leaf for leaf in leaves(state) if _has_values(leaf)]


def _names(codec: Codec, first_state: Callable[[int], State], side: str) -> list[str]:
    """A name for each leaf that has values: that of the module that makes it, numbered where it makes several."""
    makers: dict[int, str] = {}
    alive = []  # or another tensor might get the id of one that is gone

    def noting(name: str, init_state: Callable[[int], State]) -> Callable[[int], State]:
        def noted(batch_size: int) -> State:
            state = init_state(batch_size)
            alive.append(state)
            for leaf in leaves(state):
                makers.setdefault(id(leaf), name)  # an inner module is done before the outer one
            return state

        return noted

    with contextlib.ExitStack() as stack:
        for name, module in codec.named_modules():
            if hasattr(module, "init_state"):
                stack.enter_context(mock.patch.object(module, "init_state", noting(name, module.init_state)))
        state = first_state(1)
    made_by = [makers.get(id(leaf), side) for leaf in _filled(state)]
    total, seen, names = Counter(made_by), Counter[str](), []
    for name in made_by:
        names.append(name if total[name] == 1 else f"{name}.{seen[name]}")
        seen[name] += 1
    return names


def _exported(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    dynamic_shapes: Sequence[Any],
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset: int,
) -> Any:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # of packages that are not installed
    try:
        # Warnings are of PyTorch's own code, and of sizes that got another name.
        with plain_forms(), warnings.catch_warnings(action="ignore"), torch.no_grad():
            module.eval()(*inputs)  # makes the tables, of real weights
            with kept_values():
                program = torch.onnx.export(
                    module,
                    inputs,
                    dynamo=True,
                    verbose=False,
                    dynamic_shapes=tuple(dynamic_shapes),
                    input_names=list(input_names),
                    output_names=list(output_names),
                    opset_version=opset,
                )
    finally:
        logger.setLevel(level)
    assert program is not None
    # Nodes tell in which lines of which files on this machine they were made; that is nobody's business.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    return program
