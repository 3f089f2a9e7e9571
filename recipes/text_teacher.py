"""A text model as a teacher: what BERT, ELECTRA, RoBERTa and their kin make of the words that are said in a crop.

Which words these are, and when they are said, is in a file that `tools/align_words.py` writes; how word pieces teach
frames is the business of `recipes.alignments`.

Source: DM-Codec as published, https://github.com/mubtasimahasan/DM-Codec (extract_rep.py): the words of a crop by
themselves, padded to a fixed length, and the last layer or the mean of all hidden states.
"""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codec.config import register
from codec.features import one_line, read_folder
from recipes.crops import Place
from recipes.data import Batch, SpeechData
from recipes.targets import PADDING, PIECE, SPECIAL, LayeredTeacherConfig, Pieces
from recipes.words import Word, is_spoken, open_word_times

CONTEXTS = ("crop", "recording")
_ENOUGH_SHARE = 0.5  # of the speech, that should have words; below it, a warning
_KEPT_BYTES = 2**28  # of what was made of whole recordings


@dataclass(frozen=True, kw_only=True)
class TextTeacherConfig(LayeredTeacherConfig):
    """`source`: a folder of `transformers` with weights in safetensors and a fast tokenizer. `words`: a file of times.

    `layers` as of all teachers; DM-Codec's "avg" is the list of all.

    `context`: "crop" shows the model only the words of a crop, as published; "recording" shows it the whole transcript,
    and keeps what it makes of the crop's words.

    `num_slots`: every text is padded or cut to so many slots, and padding holds what the model makes of [PAD], as
    published; it goes with the context "crop". Without it a batch has as many slots as it needs, and padding is zero.
    """

    words: str
    context: str = "crop"
    num_slots: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context not in CONTEXTS:
            raise ValueError(f"context={self.context!r} is not one of {', '.join(map(repr, CONTEXTS))}")
        if self.num_slots is not None and self.context != "crop":
            raise ValueError(f"num_slots={self.num_slots} goes with context='crop': a recording's text is not padded")
        if self.num_slots is not None and self.num_slots < 3:
            raise ValueError(f"num_slots={self.num_slots} must be 3 or more: a word piece has one on either side")


@dataclass(frozen=True)
class _Slots:
    """What the model makes of one text. `words` and `shares` are of pieces, and mean nothing elsewhere."""

    values: Tensor  # float32 [S, D] or [S, L, D]
    kinds: Tensor  # int64 [S]
    words: Tensor  # int64 [S], the number of its word
    shares: Tensor  # float64 [S, 2], from where to where in its word it reaches, 0 to 1

    def chosen(self, mask: Tensor) -> _Slots:
        """The slots where `mask` [S] is true."""
        return _Slots(self.values[mask], self.kinds[mask], self.words[mask], self.shares[mask])


@register("text_teacher", TextTeacherConfig)
class TextTeacher:
    """A frozen text model and the words of recordings; `pieces` is what it says of a batch.

    It computes in float32, outside autocast and without gradients, on the device where the audio is. What it says
    follows from the batch alone. `feature_dim` is D; `num_mixed_layers` is L where layers are to be mixed, else None.

    ValueError where the folder, its tokenizer or the file of words cannot be used, or the model lacks the layers.
    """

    def __init__(self, config: TextTeacherConfig) -> None:
        self.config = config
        self._network, self.version = read_folder(config.source, "AutoModel", unused="pooler.")
        self._tokenizer = _read_tokenizer(config.source)
        about = self._network.config
        if about.is_encoder_decoder:
            raise ValueError(f"{config.source} holds a model of kind {about.model_type!r}, which is no encoder of text")
        if len(self._tokenizer) > about.vocab_size:
            counts = f"{len(self._tokenizer)} pieces, its model knows {about.vocab_size}"
            raise ValueError(f"{config.source}: its tokenizer has {counts}")
        self.feature_dim = int(about.hidden_size)
        num_states = int(about.num_hidden_layers) + 1
        self._layers = _layer_numbers(config, num_states)
        self.num_mixed_layers = num_states if config.layers == "weighted" else None
        # RoBERTa counts positions from behind its padding index on.
        padding_index = getattr(getattr(self._network, "embeddings", None), "padding_idx", None)
        num_positions = int(about.max_position_embeddings) - (0 if padding_index is None else padding_index + 1)
        self._max_slots = min(num_positions, int(self._tokenizer.model_max_length))
        if config.num_slots is not None and config.num_slots > self._max_slots:
            raise ValueError(f"num_slots={config.num_slots}: {config.source} has positions for {self._max_slots}")
        self.words = open_word_times(Path(config.words))
        self._kept: OrderedDict[tuple[str, str], _Slots] = OrderedDict()
        self._num_kept_bytes = 0

    def check(self, data: SpeechData) -> None:
        """ValueError where nothing that is drawn has words, or a line is stale; a warning where most has none."""
        seconds = seconds_with_words = 0.0
        is_named = False
        for _, recording in data.recordings():
            is_named = is_named or recording.path in self.words.entries
            seconds += recording.seconds
            seconds_with_words += recording.seconds if self.words.of(recording) is not None else 0.0
        if not is_named:
            raise ValueError(f"{self.words.file} names none of the recordings of data: it was made from others")
        if not seconds_with_words:
            raise ValueError(f"{self.words.file} has a reason instead of words for every recording of data")
        if seconds_with_words < _ENOUGH_SHARE * seconds:
            share = f"{seconds_with_words / seconds:.1%}"
            message = f"{self.words.file} has words for {share} of the speech of data: the rest teaches no text"
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def pieces(self, batch: Batch, *, seconds: float) -> Pieces:
        """What the model makes of the words of crops of so many seconds; see `Pieces` for its shapes.

        Words count that are at least half inside of a crop. A piece is said during its part of its word: that of its
        letters and digits among the word's. Spans end where the crop does.

        A crop in which nothing is said has an empty text, and so no word piece; one of a recording whose words are not
        known has padding only, of zeros. Texts that are written in capitals throughout, as in LibriSpeech, are shown to
        the model in lower case, others as they are. A text that is longer than the model, or `num_slots`, has room for
        is cut off where it is that of a crop, and halved between words until its parts fit where it is a recording's.
        """
        self._network.to(batch.audio.device)
        asked = {row: self.words.of(place.recording) for row, place in enumerate(batch.places)}
        known = {row: words for row, words in asked.items() if words is not None}
        within = {
            row: [i for i, word in enumerate(words) if _is_within(word, batch.places[row].first_second, seconds)]
            for row, words in known.items()
        }
        if self.config.context == "crop":
            shown = [[text for i, text in enumerate(_shown(known[row])) if i in within[row]] for row in known]
            slots = {
                row: replace(found, words=torch.tensor([*within[row], 0])[found.words])
                for row, found in zip(known, self._encode(shown), strict=True)
            }
        else:
            slots = {}
            for row, words in known.items():
                whole = self._of_recording(batch.places[row], words)
                is_within = torch.isin(whole.words, torch.tensor(within[row], dtype=torch.long))
                slots[row] = whole.chosen((whole.kinds == SPECIAL) | is_within)
        return self._assembled(batch, known, slots, seconds)

    def _assembled(
        self, batch: Batch, known: Mapping[int, Sequence[Word]], slots: Mapping[int, _Slots], seconds: float
    ) -> Pieces:
        """Rows of one length, with the times of their pieces; those without slots are padding."""
        num_rows = len(batch.places)
        num_slots = self.config.num_slots or max([1, *(len(row.kinds) for row in slots.values())])
        mixed = () if self.num_mixed_layers is None else (self.num_mixed_layers,)
        values = torch.zeros(num_rows, num_slots, *mixed, self.feature_dim)
        kinds = torch.full((num_rows, num_slots), PADDING)
        spans = torch.zeros(num_rows, num_slots, 2, dtype=torch.float64)
        for row, found in slots.items():
            there = slice(len(found.kinds))
            values[row, there], kinds[row, there] = found.values, found.kinds
            pairs = [(word.start_second, word.stop_second) for word in known[row]]
            times = torch.tensor([*pairs, (0.0, 0.0)], dtype=torch.float64)  # the last for slots without a word
            start, stop = times[found.words].split(1, dim=1)
            said = start + found.shares * (stop - start) - batch.places[row].first_second
            spans[row, there] = said.clamp(0.0, seconds) * (found.kinds == PIECE)[:, None]
        device = batch.audio.device
        return Pieces(values.to(device), kinds.to(device), spans.to(device))

    def _of_recording(self, place: Place, words: Sequence[Word]) -> _Slots:
        """What the model makes of all words of a recording. Each alone, so that it does not depend on the batch."""
        key = place.source, place.recording.path
        if key not in self._kept:
            self._kept[key] = self._encode_whole(_shown(words))
            self._num_kept_bytes += self._kept[key].values.nbytes
        self._kept.move_to_end(key)
        while self._num_kept_bytes > _KEPT_BYTES and len(self._kept) > 1:
            self._num_kept_bytes -= self._kept.popitem(last=False)[1].values.nbytes
        return self._kept[key]

    def _encode_whole(self, words: list[str]) -> _Slots:
        """All words of a text, in as many parts as it takes; what begins and ends parts amid the text is left out."""
        if len(words) < 2 or len(self._tokenizer(" ".join(words), verbose=False)["input_ids"]) <= self._max_slots:
            return self._encode([words])[0]
        half = len(words) // 2
        first, second = self._encode_whole(words[:half]), self._encode_whole(words[half:])
        first = first.chosen((first.kinds == PIECE).flip(0).cumsum(0).flip(0) > 0)
        second = second.chosen((second.kinds == PIECE).cumsum(0) > 0)
        second = replace(second, words=second.words + half)
        names = ("values", "kinds", "words", "shares")
        return _Slots(*(torch.cat([getattr(first, name), getattr(second, name)]) for name in names))

    def _encode(self, texts: Sequence[Sequence[str]]) -> list[_Slots]:
        """What the model makes of texts, given as words; on the CPU, with padding only where there is `num_slots`."""
        if not texts:
            return []
        num_slots, device = self.config.num_slots, self._network.device
        encoded = self._tokenizer(
            [" ".join(words) for words in texts],
            padding="longest" if num_slots is None else "max_length",
            truncation=True,
            max_length=num_slots or self._max_slots,
            return_attention_mask=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        names = {*self._tokenizer.model_input_names, "attention_mask"} & set(encoded)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            output = self._network(**{name: encoded[name].to(device) for name in names}, output_hidden_states=True)
        # Some families normalise the last one once more.
        states = [*output.hidden_states[:-1], output.last_hidden_state]
        values = torch.stack([states[layer] for layer in self._layers], dim=2).cpu()
        values = values if self.num_mixed_layers is not None else values.mean(2)
        kinds = torch.where(encoded["special_tokens_mask"] == 1, SPECIAL, PIECE)
        kinds = torch.where(encoded["attention_mask"] == 1, kinds, PADDING)
        found = []
        for row, words in enumerate(texts):
            numbers, shares = _places(words, encoded["offset_mapping"][row].tolist(), (kinds[row] == PIECE).tolist())
            slots = _Slots(values[row], kinds[row], torch.tensor(numbers), torch.tensor(shares, dtype=torch.float64))
            found.append(slots if num_slots is not None else slots.chosen(slots.kinds != PADDING))
        return found


def _read_tokenizer(folder: str) -> Any:
    # A few short texts gain nothing from threads, and processes that are forked after threads were used would complain.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with one_line(folder):
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        files = tokenizer.vocab_files_names.values()
        if not any(Path(folder, name).is_file() for name in files):  # an empty one is made up then
            raise ValueError(f"it holds no tokenizer: none of {', '.join(sorted(files))}")
        if not tokenizer.is_fast:
            raise ValueError("its tokenizer cannot tell where pieces lie in a text; a fast one (tokenizer.json) can")
        if tokenizer.pad_token_id is None:
            raise ValueError("its tokenizer has no padding token")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _layer_numbers(config: TextTeacherConfig, num_states: int) -> tuple[int, ...]:
    """The hidden states that are asked for."""
    if config.layers == "weighted":
        return tuple(range(num_states))
    if config.layers == "last":
        return (num_states - 1,)
    numbers = config.layers if isinstance(config.layers, tuple) else (config.layers,)
    if max(numbers) >= num_states:
        raise ValueError(f"layers={config.layers!r}: {config.source} has hidden states 0 to {num_states - 1}")
    return numbers


def _is_within(word: Word, first_second: float, seconds: float) -> bool:
    """Whether at least half of a word is inside of a crop."""
    inside = min(word.stop_second, first_second + seconds) - max(word.start_second, first_second)
    return inside >= 0.5 * (word.stop_second - word.start_second)


def _shown(words: Sequence[Word]) -> list[str]:
    """The words of a recording as the model is to read them."""
    texts = [word.text for word in words]
    is_mixed = any(character.islower() for text in texts for character in text)
    return texts if is_mixed else [text.lower() for text in texts]


def _places(
    words: Sequence[str], offsets: Sequence[Sequence[int]], is_piece: Sequence[bool]
) -> tuple[list[int], list[tuple[float, float]]]:
    """`words` and `shares` of `_Slots`.

    `offsets` are of the words joined by spaces. A mark of punctuation takes no part of its word.
    """
    begins = [0, *accumulate(len(word) + 1 for word in words)]  # of words, in the text
    spoken = [[0, *accumulate(is_spoken(c) for c in word)] for word in words]  # letters before each character
    numbers, shares = [], []
    for (begin, end), is_there in zip(offsets, is_piece, strict=True):
        if not is_there:
            numbers.append(0)
            shares.append((0.0, 0.0))
            continue
        number = min(max(0, bisect_right(begins, end - 1) - 1), len(words) - 1)  # that of its last character
        counts = spoken[number]
        ends = (min(max(0, place - begins[number]), len(words[number])) for place in (begin, end))
        first, last = (counts[place] / max(1, counts[-1]) for place in ends)
        numbers.append(number)
        shares.append((first, last))
    return numbers, shares
