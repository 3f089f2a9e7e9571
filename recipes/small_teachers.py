"""Small teachers from one's own recordings, where no published one can be had: a speech model and a text model.

`train_speech_teacher` trains a w2v-BERT of a few million parameters with CTC on transcripts: it is a teacher, an
aligner of words and a recogniser in one. `train_text_teacher` trains a BERT on the same transcripts. Both write folders
in the format of `transformers`, which everything here that takes a published model takes as well.

Source: Graves et al., "Connectionist temporal classification" (2006); Barrault et al., "SeamlessM4T" (2023), section
4.1 for w2v-BERT 2.0, whose network the speech model has; Devlin et al., "BERT" (2019), section 3.1 for masked words.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from codec.audio import resample
from codec.files import AtomicFile
from recipes.corpora import Corpus, open_corpus, to_channels
from recipes.data import RunSampler

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_RATE_HZ = 16000
_LONGEST_SECONDS = 20.0
_SAVE_EVERY_N_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """A run. `batch_size`: seconds of speech in a step of the speech teacher, transcripts in the text teacher's."""

    max_steps: int
    batch_size: int
    lr: float = 1e-3
    warmup_steps: int = 300
    num_layers: int = 4
    width: int = 256
    seed: int = 0
    precision: str = "bf16-mixed"

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "num_layers", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.lr <= 0.0 or self.warmup_steps < 0:
            raise ValueError("lr must be positive and warmup_steps not negative")
        if self.width % 8:  # each of 4 heads turns its dims by pairs
            raise ValueError(f"width={self.width} is not a multiple of 8")


def spoken_text(text: str) -> str | None:
    """A transcript in `LETTERS` and single spaces; None where it has none, or digits, or letters beyond these."""
    lowered = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
    cleaned = " ".join(re.sub(r"[^\w' ]+|_", " ", lowered).split())
    return cleaned if cleaned.strip("' ") and set(cleaned) <= {*LETTERS, " "} else None


def transcripts(corpus: Corpus, corpora: Sequence[str] | None) -> list[tuple[int, str]]:
    """The recordings that can be learned from, by number, with their text. ValueError where there is none.

    `corpora`: names of corpora to keep, since a corpus in another language spoils both teachers; None is all.
    """
    there = {recording.corpus for recording in corpus.recordings}
    unknown = set(corpora or ()) - there
    if unknown:
        raise ValueError(f"{corpus.source} has no corpora {sorted(unknown)} (it has {sorted(there)})")
    found = []
    for number, recording in enumerate(corpus.recordings):
        text = spoken_text(recording.text)
        if text and (corpora is None or recording.corpus in corpora) and recording.seconds <= _LONGEST_SECONDS:
            found.append((number, text))
    if not found:
        raise ValueError(f"{corpus.source} has no recordings of up to {_LONGEST_SECONDS:.0f} s with a transcript")
    return found


def train_speech_teacher(
    source: Path, out: Path, settings: TeacherSettings, *, corpora: Sequence[str] | None = None, split: str = "train"
) -> None:
    """Train on the transcribed recordings of a source and write a folder `out` for `AutoModelForCTC`.

    A run that was interrupted goes on when it is started again. ValueError where there is nothing to learn from.
    """
    from transformers import (
        SeamlessM4TFeatureExtractor,
        Wav2Vec2BertConfig,
        Wav2Vec2BertForCTC,
        Wav2Vec2BertProcessor,
        Wav2Vec2CTCTokenizer,
    )

    corpus = open_corpus(source, split=split)
    spoken = transcripts(corpus, corpora)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    features = SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, sampling_rate=_RATE_HZ, stride=2)
    vocabulary = {"<pad>": 0, "<unk>": 1, "|": 2} | {letter: 3 + i for i, letter in enumerate(LETTERS)}
    config = Wav2Vec2BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=settings.width,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=4,
        intermediate_size=4 * settings.width,
        feature_projection_input_dim=160,
        position_embeddings_type="rotary",
        conv_depthwise_kernel_size=15,
        layerdrop=0.0,
        feat_proj_dropout=0.0,
        hidden_dropout=0.05,
        activation_dropout=0.0,
        attention_dropout=0.0,
        final_dropout=0.05,
        mask_time_prob=0.05,
        mask_time_length=8,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Wav2Vec2BertForCTC(config)

    def prepared(number: int) -> np.ndarray:
        recording = corpus.recordings[number]
        audio = to_channels(corpus.read(number, 0, recording.num_samples), 1)
        mels = features(resample(audio, recording.sample_rate_hz, _RATE_HZ)[0], sampling_rate=_RATE_HZ)
        return np.asarray(mels["input_features"][0], np.float16)

    seconds = [corpus.recordings[number].seconds for number, _ in spoken]
    batches = _Batches(_by_seconds(seconds, settings.batch_size), settings.seed)
    labels = [[vocabulary[letter] for letter in text.replace(" ", "|")] for _, text in spoken]

    def load(chosen: Sequence[int], seed: int) -> dict[str, Tensor]:
        mels = [prepared(spoken[i][0]) for i in chosen]
        return {
            "input_features": _padded([torch.from_numpy(m).float() for m in mels], 0.0),
            "attention_mask": _padded([torch.ones(len(m), dtype=torch.int64) for m in mels], 0),
            "labels": _padded([torch.tensor(labels[i]) for i in chosen], -100),
        }

    _fit(model, batches, load, settings, out, corpora=corpora, split=split)
    model.save_pretrained(out)
    (out / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(
        str(out / "vocab.json"), pad_token="<pad>", unk_token="<unk>", bos_token=None, eos_token=None
    )
    Wav2Vec2BertProcessor(feature_extractor=features, tokenizer=tokenizer).save_pretrained(out)
    shutil.rmtree(out / "checkpoints")


def train_text_teacher(
    source: Path,
    out: Path,
    settings: TeacherSettings,
    *,
    corpora: Sequence[str] | None = None,
    split: str = "train",
    vocabulary_size: int = 3000,
) -> None:
    """Train on the transcripts of a source and write a folder `out` for `AutoModel`; otherwise as above.

    Pieces of words that are equally frequent may differ from run to run, not within one that was interrupted.
    """
    from tokenizers import BertWordPieceTokenizer
    from tokenizers.processors import BertProcessing
    from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    texts = [text for _, text in transcripts(open_corpus(source, split=split), corpora)]
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    pieces = _word_pieces(texts, vocabulary_size, out / "checkpoints" / "pieces.txt")
    plain = BertWordPieceTokenizer({piece: i for i, piece in enumerate(pieces)}, lowercase=True)._tokenizer
    # One that was just made puts nothing around a text by itself.
    plain.post_processor = BertProcessing(*((name, pieces.index(name)) for name in ("[SEP]", "[CLS]")))
    special = {f"{name[1:-1].lower()}_token": name for name in _SPECIAL}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=512, **special)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.width,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=4,
            intermediate_size=4 * settings.width,
            max_position_embeddings=512,
        )
    )
    masked = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)

    def load(chosen: Sequence[int], seed: int) -> dict[str, Tensor]:
        encoded = [tokenizer(texts[i], truncation=True) for i in chosen]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for _ in range(100):  # of few words none may be hidden, and the loss would be 0 / 0
                batch = dict(masked(encoded))
                if (batch["labels"] >= 0).any():
                    break
        return batch

    lengths = [float(len(text)) for text in texts]
    batches = _Batches(_by_seconds(lengths, settings.batch_size * sum(lengths) / len(lengths)), settings.seed)
    _fit(model, batches, load, settings, out, corpora=corpora, split=split, vocabulary_size=vocabulary_size)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.rmtree(out / "checkpoints")


def _word_pieces(texts: Sequence[str], vocabulary_size: int, file: Path) -> list[str]:
    """The pieces of a vocabulary, special ones first. `tokenizers` breaks ties at random, so a run keeps its own."""
    from tokenizers import BertWordPieceTokenizer

    if not file.exists():
        trained = BertWordPieceTokenizer(lowercase=True)
        trained.train_from_iterator(texts, vocab_size=vocabulary_size, min_frequency=2, show_progress=False)
        pieces = [*_SPECIAL, *sorted(trained.get_vocab().keys() - set(_SPECIAL))]
        file.parent.mkdir(parents=True, exist_ok=True)
        with AtomicFile(file) as new:
            new.file.write("".join(f"{piece}\n" for piece in pieces).encode())
            new.commit()
    return file.read_text(encoding="utf-8").split()


# Batches


def _by_seconds(seconds: Sequence[float], wanted: float) -> list[list[int]]:
    """Items of about the same length together, each batch of up to so many seconds with its padding."""
    batches: list[list[int]] = [[]]
    for item in sorted(range(len(seconds)), key=lambda item: seconds[item]):
        if batches[-1] and seconds[item] * (len(batches[-1]) + 1) > wanted:
            batches.append([])
        batches[-1].append(item)
    return batches


class _Batches(Dataset[tuple[int, list[int]]]):
    """A step and its batch, without end: every round over the data has its own order, by (seed, round)."""

    def __init__(self, batches: Sequence[list[int]], seed: int) -> None:
        self._batches, self._seed = batches, seed

    def __getitem__(self, step: int) -> tuple[int, list[int]]:
        turn, place = divmod(step, len(self._batches))
        order = np.random.default_rng((self._seed, turn)).permutation(len(self._batches)).tolist()
        return step, self._batches[order[place]]


def _padded(rows: Sequence[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


# The run


class _Learning(pl.LightningModule):
    """A model of `transformers` that computes its own loss. Every draw depends on (seed, step) alone."""

    def __init__(self, model: torch.nn.Module, settings: TeacherSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        seed = _seed(self.settings, self.global_step)
        torch.manual_seed(seed)  # dropout
        np.random.seed(seed % 2**32)  # which frames of speech are hidden
        loss: Tensor = self.model(**batch).loss
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is not finite in step {self.global_step}")
        self.log("loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def configure_optimizers(self) -> Any:
        settings = self.settings
        optimizer = torch.optim.AdamW(self.parameters(), settings.lr, betas=(0.9, 0.98), weight_decay=0.01)

        def factor(step: int) -> float:
            rising = min(1.0, (step + 1) / max(1, settings.warmup_steps))
            return rising * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / settings.max_steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _seed(settings: TeacherSettings, step: int) -> int:
    return settings.seed * 1_000_003 + step


def _fit(
    model: torch.nn.Module,
    batches: _Batches,
    load: Callable[[Sequence[int], int], dict[str, Tensor]],
    settings: TeacherSettings,
    out: Path,
    **choices: Any,
) -> None:
    """Train from the last checkpoint in `out`, if there is one; the model is ready for use after it.

    `load` makes a batch of items and a seed. `choices`: what else makes this run another one than that in `out`.
    """
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    _check_same_run(out, {"model": type(model).__name__, **asdict(settings), **choices})
    checkpoints = ModelCheckpoint(
        out / "checkpoints",
        save_last=True,
        save_top_k=0,
        every_n_train_steps=_SAVE_EVERY_N_STEPS,
        enable_version_counter=False,
    )
    trainer = pl.Trainer(
        max_steps=settings.max_steps,
        max_epochs=-1,
        precision=settings.precision,  # type: ignore[arg-type]
        gradient_clip_val=1.0,
        logger=pl.loggers.CSVLogger(out / "checkpoints", name="logs"),
        log_every_n_steps=20,
        callbacks=[checkpoints],
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=out,
    )
    loader: Any = DataLoader(
        batches,
        batch_size=None,
        sampler=RunSampler(settings.max_steps, lambda: int(trainer.global_step)),
        collate_fn=lambda batch: load(batch[1], _seed(settings, batch[0])),
        num_workers=0,
    )
    last = out / "checkpoints" / "last.ckpt"
    learning = _Learning(model.train(), settings)
    with warnings.catch_warnings():
        # It is: the items of a step follow from its number.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        trainer.fit(learning, loader, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    model.eval()


def _check_same_run(out: Path, run: dict[str, Any]) -> None:
    """ValueError where `out` holds a run of other settings that was interrupted; `max_steps` may differ."""
    run = json.loads(json.dumps(run))
    file = out / "checkpoints" / "run.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else run
    changes = [name for name in run if name != "max_steps" and before.get(name) != run[name]]
    if changes:
        told = ", ".join(f"{name} was {before.get(name)}, now {run[name]}" for name in changes)
        raise ValueError(f"{out} holds another run, which was interrupted: {told}")
    file.write_text(json.dumps(run), encoding="utf-8")
