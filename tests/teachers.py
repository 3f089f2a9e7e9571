"""Small teachers of random weights for experiments that learn from some."""

from pathlib import Path

import soundfile
import torch
from omegaconf import DictConfig
from runs import compose
from speech_models import save_model

from recipes.words import Entry, Word

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "man", "talk", "##ing", "##s", "a", "##b"]
NUM_LAYERS = 12  # as many as published teachers have


def save_text_model(folder: Path) -> Path:
    """A BERT with a WordPiece tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=160, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(PIECES),
        hidden_size=8,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=160,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def save_words(file: Path, recordings: Path) -> Path:
    """Word times of all recordings in a folder: four words, one after another, all the time."""
    lines = []
    for recording in sorted(recordings.glob("*.wav")):
        about = soundfile.info(recording)
        words = tuple(Word(PIECES[5 + i % 4].strip("#"), i / 4, (i + 1) / 4) for i in range(int(4 * about.duration)))
        entry = Entry(recording.name, about.frames, about.samplerate, "by hand", None, words, -0.1)
        lines.append(f"{entry.to_line()}\n")
    file.write_text("".join(lines))
    return file


def compose_experiment(experiment: str, *overrides: str, **teachers: Path) -> DictConfig:
    """What the command line makes of an experiment, with the teachers that it needs: these, or names that stand in."""
    arguments = (f"experiment={experiment}", *overrides)
    return compose(*arguments, *_named(compose(*arguments), **teachers))


def needs_teachers(config: DictConfig) -> bool:
    """Whether a configuration is of an experiment that learns from, or hears by, other models."""
    return bool(config.get("distillation")) or _hears_by_features(config)


def _hears_by_features(config: DictConfig) -> bool:
    return config.model is not None and config.model.get("type") == "bicodec"


def _named(
    config: DictConfig, *, speech: object = "x", text: object = "x", words: object = "x", features: object = "x"
) -> list[str]:
    overrides = [f"features={features}"] if _hears_by_features(config) else []
    for name, objective in (config.get("distillation") or {}).items():
        teacher = f"distillation.{name}.teacher"
        if objective.teacher.type == "speech_teacher":
            overrides.append(f"{teacher}.source={speech}")
        else:
            overrides += [f"{teacher}.source={text}", f"{teacher}.words={words}"]
    return overrides


def small_teachers(folder: Path, recordings: Path) -> dict[str, Path]:
    """Both teachers, the words of recordings, and a model to hear by: what `compose_experiment` takes."""
    return {
        "speech": save_model(folder / "speech", head="Model", num_hidden_layers=NUM_LAYERS),
        "text": save_text_model(folder / "text"),
        "words": save_words(folder / "words.jsonl", recordings),
        "features": save_model(
            folder / "features", "w2v-bert", head="Model", num_hidden_layers=4, hidden_size=256, intermediate_size=16
        ),
    }
