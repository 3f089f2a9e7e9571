"""BiCodec, as Spark-TTS publishes it, as a `BiCodec`.

The release is a folder with `BiCodec/config.yaml` and `BiCodec/model.safetensors`, a `config.yaml` that says how audio
is prepared, and the speech model in `wav2vec2-large-xlsr-53/`. Every tensor is used once, but those that say nothing of
the model, which are left behind by name: the counts of codes and of batches that training keeps, and what the mel
spectrum is computed with, which is computed anew. Weight norm is accepted in its three spellings and folded.

`codec.importers.speech_folder.copy_speech_model` brings the speech model along; without it the codec decodes only.

Source: the layout as published, https://github.com/SparkAudio/Spark-TTS (sparktts/models/bicodec.py and modules) and
its settings, BiCodec/config.yaml and config.yaml of Spark-TTS-0.5B.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from codec.config import from_dict
from codec.importers.checkpoint import check_tensors, checked_tensors, fold_weight_norm, read_checkpoint, renamed
from codec.models.bicodec import BiCodec, BiCodecConfig

_CODEC_FOLDER, _SPEECH_FOLDER = "BiCodec", "wav2vec2-large-xlsr-53"
_LEFT_BEHIND = r"quantizer\.cluster_size|.*\.num_batches_tracked|mel_transformer\.(spectrogram\.window|mel_scale\.fb)"
_PARTS = ("mel_params", "encoder", "quantizer", "speaker_encoder", "prenet", "postnet", "decoder")
_HEAD_DIM = 64  # no shape tells it

# In this order.
_RENAMINGS = (
    (r"^speaker_encoder\.quantizer\.project_in\.", "voice_quantizer.in_proj."),
    (r"^speaker_encoder\.quantizer\.project_out\.", "voice_quantizer.out_proj."),
    (r"^speaker_encoder\.project\.", "from_voice_latents."),
    # The perceiver
    (r"^speaker_encoder\.perceiver_sampler\.", "speaker_encoder.resampler."),
    (r"\.resampler\.proj_context\.", ".resampler.enter."),
    (r"\.resampler\.norm\.gamma$", ".resampler.scale"),
    (r"\.resampler\.layers\.(\d+)\.0\.to_q\.", r".resampler.layers.\1.queries."),
    (r"\.resampler\.layers\.(\d+)\.0\.to_kv\.", r".resampler.layers.\1.keys_values."),
    (r"\.resampler\.layers\.(\d+)\.0\.to_out\.", r".resampler.layers.\1.attended."),
    (r"\.resampler\.layers\.(\d+)\.1\.0\.", r".resampler.layers.\1.expand."),
    (r"\.resampler\.layers\.(\d+)\.1\.2\.", r".resampler.layers.\1.project."),
    # ECAPA-TDNN
    (r"^speaker_encoder\.speaker_encoder\.", "speaker_encoder.ecapa."),
    (r"\.ecapa\.layer1\.", ".ecapa.enter."),
    (r"\.ecapa\.layer2\.se_res2block\.", ".ecapa.blocks.0."),
    (r"\.ecapa\.layer3\.se_res2block\.", ".ecapa.blocks.1."),
    (r"\.ecapa\.layer4\.se_res2block\.", ".ecapa.blocks.2."),
    (r"(\.ecapa\.blocks\.\d+)\.0\.", r"\1.enter."),
    (r"(\.ecapa\.blocks\.\d+)\.1\.convs\.(\d+)\.", r"\1.groups.\2.conv."),
    (r"(\.ecapa\.blocks\.\d+)\.1\.bns\.(\d+)\.", r"\1.groups.\2.norm."),
    (r"(\.ecapa\.blocks\.\d+)\.2\.", r"\1.leave."),
    (r"(\.ecapa\.blocks\.\d+)\.3\.linear1\.", r"\1.squeeze."),
    (r"(\.ecapa\.blocks\.\d+)\.3\.linear2\.", r"\1.excite."),
    (r"\.ecapa\.conv\.", ".ecapa.mix."),
    (r"\.ecapa\.pool\.linear1\.", ".ecapa.pool.hidden."),
    (r"\.ecapa\.pool\.linear2\.", ".ecapa.pool.scores."),
    (r"\.ecapa\.linear\.", ".ecapa.leave."),
    (r"(\.ecapa\..*\b)bn\.", r"\1norm."),
    # Encoder, prenet and postnet
    (r"^encoder\.encoder\.", "encoder.stack."),
    (r"^encoder\.project\.", "encoder.leave."),
    (r"^(pre|post)net\.linear_pre\.", r"\1net.enter."),
    (r"^(pre|post)net\.vocos_backbone\.", r"\1net.stack."),
    (r"^(pre|post)net\.linear\.", r"\1net.leave."),
    (r"\.downsample\.(\d+)\.1\.", r".stages.\1."),
    (r"\.embed\.", ".enter."),
    (r"\.convnext\.(\d+)\.gamma$", r".blocks.\1.scale"),
    (r"\.convnext\.(\d+)\.dwconv\.", r".blocks.\1.conv."),
    (r"\.convnext\.(\d+)\.pwconv1\.", r".blocks.\1.expand."),
    (r"\.convnext\.(\d+)\.pwconv2\.", r".blocks.\1.project."),
    (r"\.convnext\.", ".blocks."),
    (r"\.final_layer_norm\.", ".last_norm."),
    # Quantizer and wave generator
    (r"^quantizer\.in_project\.", "quantizer.stages.0.in_proj."),
    (r"^quantizer\.out_project\.", "quantizer.stages.0.out_proj."),
    (r"^quantizer\.codebook\.weight$", "quantizer.stages.0.codebook"),
    (r"^decoder\.model\.", "decoder.layers."),
    (r"(^decoder.*)\.block\.(\d+)\.block\.(\d+)\.", r"\1.layers.\2.branch.layers.\3."),
    (r"(^decoder.*)\.block\.(\d+)\.", r"\1.layers.\2."),
)


def load_bicodec(
    source: str | os.PathLike[str], *, config: BiCodecConfig | None = None, allow_pickle: bool = False
) -> BiCodec:
    """A BiCodec as a codec, ready for use: float32, in evaluation mode, without gradients.

    `source` is the folder of the release, the folder `BiCodec` in it, or a file of weights alone, whose model is
    `config`, by default the published one. With the folder of the release `feature_folder` is that of its speech model.

    Only safetensors are read, unless `allow_pickle`: then other files too, by `torch.load(weights_only=True)`.

    ValueError where a tensor is missing, unknown or of another shape than the config asks for; it names them.
    """
    folder = Path(source)
    path, is_whole = folder, (folder / _CODEC_FOLDER).is_dir()
    settings: dict[str, Any] | None = None
    if folder.is_dir():
        home = folder / _CODEC_FOLDER if is_whole else folder
        path = home / "model.safetensors"
        if config is not None:
            raise ValueError(f"{home} has a config.yaml, so config= cannot be given")
        settings = _settings(home / "config.yaml", folder / "config.yaml" if is_whole else None)
    tensors = checked_tensors(read_checkpoint(path, allow_pickle=allow_pickle), path)
    tensors = {key: value for key, value in tensors.items() if not re.fullmatch(_LEFT_BEHIND, key)}
    tensors, spellings = renamed(tensors, _RENAMINGS, path)
    fold_weight_norm(tensors, path)
    if settings is not None:
        config = from_dict(settings | _told_by_shapes(tensors, path), str(path.parent / "config.yaml"))
    for key in [key for key in tensors if key.endswith(".alpha")]:
        tensors[key] = tensors[key].flatten()  # published as [1, C, 1]
    codec = BiCodec(config or BiCodecConfig())
    check_tensors(tensors, codec.state_dict(), spellings, path)
    codec.load_state_dict(tensors)
    if is_whole and (folder / _SPEECH_FOLDER).is_dir():
        codec.feature_folder = folder / _SPEECH_FOLDER
    return codec.eval().requires_grad_(False)


def _settings(path: Path, preparing: Path | None) -> dict[str, Any]:
    """The dict of a `BiCodecConfig`, but for what shapes tell; `preparing` says how audio is prepared."""
    parts = _read_yaml(path).get("audio_tokenizer")
    if not isinstance(parts, dict):
        raise ValueError(f"{path} does not describe a BiCodec: it has no audio_tokenizer")
    if missing := [name for name in _PARTS if not isinstance(parts.get(name), dict)]:
        raise ValueError(f"{path} does not describe a BiCodec: it has no {', '.join(missing)}")
    front = _read_yaml(preparing) if preparing is not None and preparing.is_file() else {}
    try:
        return _converted(parts, front)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _converted(parts: dict[str, Any], front: dict[str, Any]) -> dict[str, Any]:
    mels, encoder, quantizer, speaker, prenet, postnet, decoder = (parts[name] for name in _PARTS)
    for network in (encoder, prenet, postnet):
        if set(ratios := network.get("sample_ratios", [1, 1])) != {1} or len(ratios) != len(encoder["sample_ratios"]):
            raise ValueError(f"sample_ratios={ratios} are not supported: all networks need as many, each of them 1")
    if prenet.get("use_tanh_at_final") or mels["mel_fmax"] is not None or speaker["fsq_num_quantizers"] != 1:
        raise ValueError("use_tanh_at_final, a mel_fmax and more than one FSQ are not supported")
    sample_rate_hz, hop = mels["sample_rate"], mels["hop_length"]
    if front.get("sample_rate", sample_rate_hz) != sample_rate_hz:
        raise ValueError(f"its audio is at {sample_rate_hz} Hz, elsewhere it is at {front['sample_rate']} Hz")
    frame = front.get("latent_hop_length", hop)
    return {
        "type": "bicodec",
        "sample_rate_hz": sample_rate_hz,
        "quantizer": {
            "type": "factorized_vq",
            "latent_dim": quantizer["input_dim"],
            "num_stages": 1,
            "codebook_size": quantizer["codebook_size"],
            "codebook_dim": quantizer["codebook_dim"],
        },
        "voice_quantizer": {"type": "fsq", "latent_dim": speaker["latent_dim"], "levels": speaker["fsq_levels"]},
        "num_global_codes": speaker["token_num"],
        "voice_dim": speaker["out_dim"],
        "voice_samples": int(sample_rate_hz * front.get("ref_segment_duration", 6)) // frame * frame,
        "volume_normalize": front.get("volume_normalize", True),
        "feature_dim": encoder["input_channels"],
        "hidden_dim": encoder["vocos_dim"],
        "expanded_dim": encoder["vocos_intermediate_dim"],
        "num_stages": len(encoder["sample_ratios"]),
        "encoder_blocks": encoder["vocos_num_layers"],
        "prenet_blocks": prenet["vocos_num_layers"],
        "postnet_blocks": postnet["vocos_num_layers"],
        "num_mels": mels["num_mels"],
        "mel_fft_samples": mels["n_fft"],
        "mel_window_samples": mels["win_length"],
        "mel_hop_samples": hop,
        "mel_min_hz": mels["mel_fmin"],
        "decoder_dim": decoder["channels"],
        "decoder_rates": decoder["rates"],
        "decoder_kernel_sizes": decoder["kernel_sizes"],
    }


def _told_by_shapes(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """What the settings leave to the code that was published with them. Names are ours."""
    speaker = "speaker_encoder"
    try:
        return {
            "speaker_channels": len(tensors[f"{speaker}.ecapa.enter.conv.bias"]),
            "bottleneck_dim": len(tensors[f"{speaker}.ecapa.pool.hidden.bias"]),
            "perceiver_layers": _count(tensors, rf"{speaker}\.resampler\.layers\.\d+\.queries\.weight"),
            "num_heads": len(tensors[f"{speaker}.resampler.layers.0.queries.weight"]) // _HEAD_DIM,
            "head_dim": _HEAD_DIM,
        }
    except KeyError as error:
        raise ValueError(f"{path} does not hold a BiCodec: {error.args[0]} is missing") from error


def _count(names: Sequence[str] | dict[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ValueError where there is none, or nothing to read it with."""
    try:
        import yaml
    except ImportError as error:
        raise ValueError(f"{path} is YAML, which needs the package PyYAML (the extra 'ssl' brings it)") from error
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a mapping")
    return data
