"""Small speech models of random weights, in folders as `transformers` publishes them, for tests."""

import json
from pathlib import Path
from typing import Any

import torch

LABELS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABC"]
_CONVOLUTIONS = {"conv_dim": (8, 8), "conv_kernel": (8, 4), "conv_stride": (4, 2)}
_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": len(LABELS),
    "pad_token_id": 0,
}
_WAVEFORM: dict[str, Any] = _SMALL | {
    **_CONVOLUTIONS,
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
_PRE_NORM: dict[str, Any] = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "hubert": ("Hubert", _WAVEFORM),
    "xlsr": ("Wav2Vec2", _WAVEFORM | _PRE_NORM),
    "wavlm": ("WavLM", _WAVEFORM | _PRE_NORM),
    "data2vec": ("Data2VecAudio", _WAVEFORM | {"num_conv_pos_embeddings": 1, "conv_pos_kernel_size": 3}),
    "conformer": ("Wav2Vec2Conformer", _WAVEFORM),
    "w2v-bert": ("Wav2Vec2Bert", _SMALL | {"feature_projection_input_dim": 16}),
}


def save_model(
    folder: Path, kind: str = "hubert", *, head: str = "ForCTC", normalize: bool = True, **changes: Any
) -> Path:
    """A small model of random weights in the format that is published, with a tokenizer of `LABELS`."""
    import transformers

    name, values = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(values | changes))
    getattr(transformers, f"{name}{head}")(config).save_pretrained(folder)
    if kind == "w2v-bert":
        transformers.SeamlessM4TFeatureExtractor(feature_size=8, num_mel_bins=8).save_pretrained(folder)
    else:
        transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({label: column for column, label in enumerate(LABELS)}))
    transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    return folder
