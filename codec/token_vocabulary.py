"""Ids: what a language model reads and writes instead of codes, and back, whole or as they come.

    Tokens -> Vocabulary.encode -> ids int64 [B, S, N] -> Vocabulary.decode -> Tokens
    ids of a language model, in pieces -> VocabularyDecoder.push -> codes of the frames complete so far

A recording is `begin`, its frames, `end`; where it has global codes, `begin_global` and these come first. After its end
there is only `pad`. Ids, from `first_id` on: pad, begin, end, (begin_global,) the codes of each row, global codes.

Letters: B batch, S streams (ids that a model writes at once), N steps, K rows of codes, F frames, L global codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from codec.token_order import END, PAD, Delayed, OneStream, Order
from codec.tokens import Tokens, delay, flatten, interleave

_BEGIN, _BEGIN_GLOBAL, _GLOBAL = -3, -4, -5  # kinds beside those of `codec.token_order`
PATTERNS = ("flatten", "interleave", "delay")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids of a codec's tokens, and the order in which they stand.

    `codec_id`, `hop_length`, `codebook_sizes`: of the codec, the sizes of the rows of codes that take part.
    `pattern`: "flatten", one stream, frame after frame; "interleave", one stream, in blocks of `block_frames` first
    the `num_coarse` coarse rows (see `codec.tokens.interleave`); "delay", a stream per row, row k late by k steps.
    `num_global_codes`, `global_codebook_size`: of codecs that keep the voice apart.
    `shares_ids`: rows have the same ids, and only the position tells them apart; else each row has its own.
    `first_id`: where ids begin, such as the size of the text vocabulary that they extend.

    >>> vocabulary = Vocabulary(codec_id="example", hop_length=320, codebook_sizes=(1024, 1024))
    >>> tokens = Tokens(torch.tensor([[[7, 8], [5, 6]]]), torch.tensor([640]), "example")
    >>> vocabulary.encode(tokens).tolist()
    [[[1, 10, 1032, 11, 1033, 2]]]
    >>> vocabulary.decode(vocabulary.encode(tokens)).codes.tolist()
    [[[7, 8], [5, 6]]]
    """

    codec_id: str
    hop_length: int
    codebook_sizes: tuple[int, ...]
    pattern: str = "flatten"
    num_coarse: int | None = None
    block_frames: int | None = None
    num_global_codes: int = 0
    global_codebook_size: int = 0
    shares_ids: bool = False
    first_id: int = 0

    def __post_init__(self) -> None:
        if self.hop_length < 1 or not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(f"hop_length={self.hop_length} and codebook_sizes={self.codebook_sizes} must be positive")
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern={self.pattern!r} is not one of {PATTERNS}")
        is_interleaved = self.pattern == "interleave"
        if (self.num_coarse is None) == is_interleaved or (self.block_frames is None) == is_interleaved:
            raise ValueError("num_coarse and block_frames go with pattern='interleave', which needs both")
        if is_interleaved and (not 0 < self._coarse < self.num_quantizers or self._block < 1):
            raise ValueError(
                f"num_coarse={self.num_coarse} must leave both parts some of {self.num_quantizers} rows, "
                f"and block_frames={self.block_frames} be positive"
            )
        if self.shares_ids and is_interleaved and self._block > 1:
            raise ValueError("shares_ids=True: the end of the coarse part of a last, shorter block would not be known")
        if min(self.num_global_codes, self.global_codebook_size) < 0:
            raise ValueError("num_global_codes and global_codebook_size must not be negative")
        if (self.num_global_codes == 0) != (self.global_codebook_size == 0):
            raise ValueError("num_global_codes and global_codebook_size need each other")
        if self.first_id < 0:
            raise ValueError(f"first_id={self.first_id} must not be negative")

    # The ids

    @property
    def num_quantizers(self) -> int:
        """K: the rows of codes that take part."""
        return len(self.codebook_sizes)

    @property
    def num_streams(self) -> int:
        """S: how many ids there are to a step."""
        return self.num_quantizers if self.pattern == "delay" else 1

    @property
    def pad_id(self) -> int:
        """After the end of a recording, and where a delayed row has nothing yet."""
        return self.first_id

    @property
    def begin_id(self) -> int:
        """Before the first frame."""
        return self.first_id + 1

    @property
    def end_id(self) -> int:
        """After the last frame."""
        return self.first_id + 2

    @property
    def begin_global_id(self) -> int:
        """Before the global codes. ValueError where there are none."""
        if not self.num_global_codes:
            raise ValueError("this vocabulary has no global codes")
        return self.first_id + 3

    @cached_property
    def row_ids(self) -> tuple[range, ...]:
        """The ids of each row of codes."""
        start = self.first_id + 3 + (self.num_global_codes > 0)
        found = []
        for size in self.codebook_sizes:
            found.append(range(start, start + size))
            start += 0 if self.shares_ids else size
        return tuple(found)

    @property
    def global_ids(self) -> range:
        """The ids of global codes."""
        start = max(ids.stop for ids in self.row_ids)
        return range(start, start + self.global_codebook_size)

    @property
    def num_ids(self) -> int:
        """One more than the largest id: how many a model needs, those before `first_id` included."""
        return self.global_ids.stop

    # Tokens to ids

    def encode(self, tokens: Tokens) -> Tensor:
        """Tokens -> ids int64 [B, S, N], rows that are shorter than the longest filled up with `pad_id`.

        Frames past a recording's `num_samples` are left out. ValueError for tokens that are not of this vocabulary.
        """
        return self._padded(tokens, is_open=False)

    def prompt(self, tokens: Tokens) -> Tensor:
        """As `encode`, but of beginnings that a model shall go on with: without an end. Rows must be equally long.

        What the pattern cannot hold of an open end is left out: a block that is not whole; and, of delayed rows, row k
        of the last k frames, which the model writes anew.
        """
        if len(set(self._num_frames(tokens))) > 1:
            raise ValueError("prompts of one batch must have equally many frames")
        return self._padded(tokens, is_open=True)

    @property
    def num_steps_before(self) -> int:
        """Steps before the first frame."""
        return 1 + (1 + self.num_global_codes if self.num_global_codes else 0)

    @property
    def steps_per_block(self) -> int:
        """Steps after which the pattern is where it was."""
        return 1 if self.pattern == "delay" else self._block * self.num_quantizers

    def num_steps(self, num_frames: int) -> int:
        """N: how many steps a recording of so many frames takes."""
        before = self.num_steps_before
        if self.pattern == "delay":
            return before + num_frames + self.num_quantizers
        return before + num_frames * self.num_quantizers + 1

    def max_frames(self, num_steps: int) -> int:
        """The most frames that fit into so many steps; negative where not even an empty recording does."""
        return (num_steps - self.num_steps(0)) // (1 if self.pattern == "delay" else self.num_quantizers)

    # Ids to tokens

    def decode(self, ids: Tensor) -> Tokens:
        """Ids int64 [B, S, N] of whole recordings -> tokens. `num_samples` are those of all frames.

        ValueError that says where, for an id that cannot stand there, and for a recording without an end.
        """
        if ids.dim() != 3:
            raise ValueError(f"ids must be int64 [B, {self.num_streams}, N], got {ids.dtype} {tuple(ids.shape)}")
        rows, decoders = [], []
        for index, row in enumerate(ids):
            decoder = VocabularyDecoder(self)
            try:
                rows.append(decoder.push(row))
            except ValueError as error:
                raise ValueError(f"row {index}: {error}") from error
            if not decoder.is_ended:
                raise ValueError(f"row {index}: it has no end after {ids.shape[2]} steps")
            decoders.append(decoder)
        num_frames = torch.tensor([row.shape[1] for row in rows], dtype=torch.int64)
        longest = int(num_frames.max()) if rows else 0
        codes = [F.pad(row, (0, longest - row.shape[1])) for row in rows]
        heard = [decoder.global_codes for decoder in decoders if decoder.global_codes is not None]
        none = torch.zeros(0, self.num_global_codes, dtype=torch.int64)
        return Tokens(
            torch.stack(codes) if codes else torch.zeros(0, self.num_quantizers, 0, dtype=torch.int64),
            num_frames * self.hop_length,
            self.codec_id,
            global_codes=(torch.stack(heard) if heard else none) if self.num_global_codes else None,
        ).to(ids.device)

    # Parts

    @property
    def _coarse(self) -> int:
        """Rows in the first part of a block; without interleaving, all of them."""
        return self.num_quantizers if self.num_coarse is None else self.num_coarse

    @property
    def _block(self) -> int:
        return 1 if self.block_frames is None else self.block_frames

    def _ids_of_kinds(self) -> dict[int, range]:
        """The ids of every kind of thing that can stand in a sequence."""
        special = {PAD: self.pad_id, _BEGIN: self.begin_id, END: self.end_id}
        if self.num_global_codes:
            special[_BEGIN_GLOBAL] = self.begin_global_id
        return (
            {kind: range(id, id + 1) for kind, id in special.items()}
            | dict(enumerate(self.row_ids))
            | {_GLOBAL: self.global_ids}
        )

    def _num_frames(self, tokens: Tokens) -> list[int]:
        return [-(-n // self.hop_length) for n in tokens.num_samples.tolist()]

    def _padded(self, tokens: Tokens, *, is_open: bool) -> Tensor:
        nums_frames = self._check(tokens)
        device = tokens.codes.device
        offsets = torch.tensor([ids.start for ids in self.row_ids], device=device)[:, None]
        found = []
        for row, num_frames in enumerate(nums_frames):
            codes = tokens.codes[row, :, :num_frames]
            body = self._body(codes + offsets, is_open=is_open)
            before = body.new_full((self.num_streams, self.num_steps_before), self.pad_id)
            if tokens.global_codes is not None:
                before[:, 0] = self.begin_global_id
                before[0, 1:-1] = tokens.global_codes[row] + self.global_ids.start
            before[:, -1] = self.begin_id
            found.append(torch.cat([before, body], dim=1))
        longest = max((row.shape[1] for row in found), default=0)
        padded = [F.pad(row, (0, longest - row.shape[1]), value=self.pad_id) for row in found]
        return torch.stack(padded) if padded else torch.zeros(0, self.num_streams, 0, dtype=torch.int64, device=device)

    def _body(self, ids: Tensor, *, is_open: bool) -> Tensor:
        """Ids of the codes [K, F] of a recording -> [S, n] in the order of the pattern, with or without the end."""
        num_frames = ids.shape[1]
        if is_open:
            ids = ids[:, : num_frames // self._block * self._block]
        if self.pattern == "delay":
            end = ids.new_full((self.num_quantizers, 0 if is_open else 1), self.end_id)
            delayed = delay(torch.cat([ids, end], dim=1)[None], fill=self.pad_id)[0]
            return delayed[:, :num_frames] if is_open else delayed
        ordered = interleave(ids[None], self._coarse, self._block) if self.num_coarse else flatten(ids[None])
        return ordered if is_open else F.pad(ordered, (0, 1), value=self.end_id)

    def _check(self, tokens: Tokens) -> list[int]:
        """The frames of each recording."""
        if tokens.codec_id != self.codec_id:
            raise ValueError(
                f"these tokens were made by codec {tokens.codec_id!r}, this vocabulary is of {self.codec_id!r}"
            )
        codes, global_codes = tokens.codes, tokens.global_codes
        if codes.shape[1] != self.num_quantizers:
            raise ValueError(f"this vocabulary has {self.num_quantizers} rows of codes, the tokens {codes.shape[1]}")
        nums_frames = self._num_frames(tokens)
        if max(nums_frames, default=0) > codes.shape[2]:
            raise ValueError(f"{max(nums_frames)} frames are told by num_samples, {codes.shape[2]} are there")
        sizes = torch.tensor(self.codebook_sizes, device=codes.device)[:, None]
        if bool(((codes < 0) | (codes >= sizes)).any()):
            raise ValueError(f"a code is outside its codebook of {self.codebook_sizes}")
        given = 0 if global_codes is None else global_codes.shape[1]
        if given != self.num_global_codes:
            raise ValueError(f"this vocabulary has {self.num_global_codes} global codes, the tokens {given}")
        if global_codes is not None and bool(((global_codes < 0) | (global_codes >= self.global_codebook_size)).any()):
            raise ValueError(f"a global code is outside its codebook of {self.global_codebook_size}")
        return nums_frames


class VocabularyDecoder:
    """Ids of one recording in pieces of any size -> codes of the frames that they complete.

    Between pieces `valid_ids` says what may come next, so that a model's sampling can be held to it. All pieces
    together give what `Vocabulary.decode` gives for the whole.

    >>> decoder = VocabularyDecoder(Vocabulary(codec_id="example", hop_length=320, codebook_sizes=(4, 4)))
    >>> [decoder.push(torch.tensor([[id]])).tolist() for id in (1, 3, 8, 2)], decoder.is_ended
    ([[[], []], [[], []], [[0], [1]], [[], []]], True)
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.num_steps = 0  # that were pushed
        self._global_codes: list[int] = []
        self._rows: list[list[int]] = [[] for _ in vocabulary.codebook_sizes]  # codes that were not given out yet
        self._order: Order = (
            Delayed()
            if vocabulary.pattern == "delay"
            else OneStream(vocabulary.num_quantizers, vocabulary._coarse, vocabulary._block)
        )
        self._ids = vocabulary._ids_of_kinds()

    @property
    def is_ended(self) -> bool:
        """Whether the end was pushed, of all rows; then nothing but padding may follow."""
        return self._order.is_ended

    @property
    def global_codes(self) -> Tensor | None:
        """Int64 [L] once all are there; None before, and where there are none."""
        wanted = self.vocabulary.num_global_codes
        return torch.tensor(self._global_codes) if wanted and len(self._global_codes) == wanted else None

    def push(self, ids: Tensor) -> Tensor:
        """Ids int64 [S, n], n >= 0 -> codes int64 [K, F] of the frames that are complete with them; F may be 0.

        ValueError that tells the position, for an id that cannot stand there; the decoder is of no use after it.
        """
        num_streams = self.vocabulary.num_streams
        if ids.dim() != 2 or ids.shape[0] != num_streams or ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 [{num_streams}, n], got {ids.dtype} {tuple(ids.shape)}")
        for step in ids.T.tolist():
            kinds = [self._kind(stream, id) for stream, id in enumerate(step)]
            for kind, id in zip(kinds, step, strict=True):
                if kind >= 0:
                    self._rows[kind].append(id - self._ids[kind].start)
                elif kind == _GLOBAL:
                    self._global_codes.append(id - self._ids[kind].start)
            if self.num_steps >= self.vocabulary.num_steps_before:
                self._order.take(kinds)
            self.num_steps += 1
        num_frames = min(map(len, self._rows))
        codes = torch.tensor([row[:num_frames] for row in self._rows], dtype=torch.int64, device=ids.device)
        self._rows = [row[num_frames:] for row in self._rows]
        return codes

    def valid_ids(self, *, may_end: bool = True) -> Tensor:
        """Which ids may come next: bool [S, num_ids]. With `may_end=False`, without those that end the recording."""
        mask = torch.zeros(self.vocabulary.num_streams, self.vocabulary.num_ids, dtype=torch.bool)
        for stream, row in enumerate(mask):
            expected = self._expected(stream)
            if not may_end and 0 in expected:  # all else would end it, or shorten a block, which then is the last
                expected = (0,)
            for kind in expected:
                row[self._ids[kind].start : self._ids[kind].stop] = True
        return mask

    def _expected(self, stream: int) -> tuple[int, ...]:
        num_left = self.vocabulary.num_steps_before - self.num_steps
        if num_left <= 0:
            return self._order.expected(stream)
        if num_left == 1:
            return (_BEGIN,)
        if self.num_steps == 0:
            return (_BEGIN_GLOBAL,)
        return (_GLOBAL if stream == 0 else PAD,)

    def _kind(self, stream: int, id: int) -> int:
        """What an id is where it stands. ValueError where it cannot stand there."""
        expected = self._expected(stream)
        for kind in expected:
            if id in self._ids[kind]:
                return kind
        where = f"position {self.num_steps}" + (f" of stream {stream}" if self.vocabulary.num_streams > 1 else "")
        raise ValueError(f"id {id} at {where} is not {' or '.join(map(self._told, expected))}")

    def _told(self, kind: int) -> str:
        names = {END: "the end", PAD: "padding", _BEGIN: "begin", _BEGIN_GLOBAL: "begin of global codes"}
        names[_GLOBAL] = "a global code"
        ids = self._ids[kind]
        numbers = str(ids.start) if len(ids) == 1 else f"{ids.start}..{ids.stop - 1}"
        return f"{names.get(kind, f'a code of row {kind}')} ({numbers})"
