import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from margins import assert_same_codes
from safetensors.torch import save_file
from torch import Tensor

from codec.importers.encodec import ENCODEC_24KHZ, ENCODEC_48KHZ, load_encodec
from codec.models.seanet import SEANetCodec, SEANetConfig
from codec.pretrained import load, save
from codec.quantizers.residual import ResidualVQConfig
from codec.testing import speech_like
from codec.tokens import Tokens

TINY = SEANetConfig(
    sample_rate_hz=8000,
    ratios=(3, 2),
    num_filters=4,
    num_lstm_layers=1,
    pad_mode="reflect",
    quantizer=ResidualVQConfig(latent_dim=6, num_stages=4, codebook_size=16),
)
TINY_STEREO = SEANetConfig(
    sample_rate_hz=8000,
    num_channels=2,
    ratios=(3, 2),
    num_filters=4,
    num_lstm_layers=1,
    causal=False,
    pad_mode="reflect",
    norm="group",
    segment_samples=6000,
    segment_stride_samples=5940,
    normalize_loudness=True,
    quantizer=ResidualVQConfig(latent_dim=6, num_stages=4, codebook_size=16),
)
SPELLINGS = ["g_and_v", "parametrized", "folded"]


def _random_codec(config: SEANetConfig) -> SEANetCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SEANetCodec(config).requires_grad_(False)


def _audio(num_rows: int, num_channels: int, num_samples: int) -> Tensor:
    signals = [torch.from_numpy(speech_like(num_samples, seed=seed)) for seed in range(num_rows * num_channels)]
    return torch.stack(signals).view(num_rows, num_channels, num_samples)


def _original(codec: SEANetCodec, spelling: str) -> dict[str, Tensor]:
    """The state dict that the `encodec` package would write of the same model."""
    found: dict[str, Tensor] = {}
    for key, value in codec.state_dict().items():
        if key == "quantizer.codebooks":
            for stage, codebook in enumerate(value):
                prefix = f"quantizer.vq.layers.{stage}._codebook"
                found[f"{prefix}.inited"] = torch.ones(1)
                found[f"{prefix}.cluster_size"] = torch.ones(len(codebook))
                found[f"{prefix}.embed"] = codebook.clone()
                found[f"{prefix}.embed_avg"] = codebook.clone()
            continue
        side, _, index, rest = key.split(".", 3)
        if rest.startswith("lstm."):
            found[f"{side}.model.{index}.{rest}"] = value
            continue
        name, tensor = (
            re.sub(r"branch\.layers\.(\d)", r"block.\1", rest).replace("shortcut.layers.0", "shortcut"),
            value,
        )
        *inner, last = name.split(".")
        is_norm = bool(inner) and inner[-1] == "norm"
        inner = inner[:-1] if is_norm else inner
        is_transposed = side == "decoder" and not inner and index not in ("0", str(len(codec.decoder.layers) - 1))
        kind = "convtr" if is_transposed else "conv"
        prefix = ".".join([side, "model", index, *inner, kind, "norm" if is_norm else kind])
        if last == "weight" and not is_norm and spelling != "folded":
            # Any length of the direction gives the same weight.
            names = {"g_and_v": ("weight_g", "weight_v")}.get(
                spelling, ("parametrizations.weight.original0", "parametrizations.weight.original1")
            )
            found[f"{prefix}.{names[0]}"] = tensor.flatten(1).norm(dim=1).view(-1, 1, 1)
            found[f"{prefix}.{names[1]}"] = 3 * tensor
        else:
            found[f"{prefix}.{last}"] = tensor
    return found


def _of_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict as `transformers` would write it."""
    renamings = [("model.", "layers."), ("conv.conv.", "conv."), ("convtr.convtr.", "conv."), ("conv.norm.", "norm.")]
    renamings += [("convtr.norm.", "norm."), ("quantizer.vq.", "quantizer."), ("._codebook.", ".codebook.")]
    renamed = {}
    for key, value in tensors.items():
        for old, new in renamings:
            key = key.replace(old, new)
        renamed[key] = value
    return renamed


def _transformers_config(config: SEANetConfig, **changes: Any) -> dict[str, Any]:
    values = {
        "model_type": "encodec",
        "target_bandwidths": [config.quantizer.num_stages * 4 * -(-config.sample_rate_hz // config.hop_length) / 1000],
        "sampling_rate": config.sample_rate_hz,
        "audio_channels": config.num_channels,
        "normalize": config.normalize_loudness,
        "chunk_length_s": config.segment_samples and config.segment_samples / config.sample_rate_hz,
        "overlap": config.segment_samples and 0.01,
        "hidden_size": config.quantizer.latent_dim,
        "num_filters": config.num_filters,
        "num_residual_layers": config.num_residual_blocks,
        "upsampling_ratios": list(config.ratios),
        "norm_type": {"weight": "weight_norm", "group": "time_group_norm"}[config.norm],
        "kernel_size": config.kernel_size,
        "last_kernel_size": config.last_kernel_size,
        "residual_kernel_size": config.residual_kernel_size,
        "dilation_growth_rate": config.dilation_base,
        "use_causal_conv": config.causal,
        "pad_mode": "reflect",
        "compress": config.compress,
        "num_lstm_layers": config.num_lstm_layers,
        "trim_right_ratio": 1.0,
        "codebook_size": config.quantizer.codebook_size,
        "codebook_dim": config.quantizer.latent_dim,
        "use_conv_shortcut": config.conv_shortcut,
    }
    return values | changes


def _assert_same_weights(codec: SEANetCodec, expected: SEANetCodec) -> None:
    theirs = expected.state_dict()
    assert codec.config == expected.config
    assert not codec.training
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    for key, value in codec.state_dict().items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=0)  # g * v / |v| rounds


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("config", [TINY, TINY_STEREO], ids=["mono", "stereo"])
def test_files_of_either_layout(tmp_path: Path, config: SEANetConfig, spelling: str) -> None:
    expected = _random_codec(config)
    tensors = _original(expected, spelling)
    save_file(tensors, tmp_path / "original.safetensors")
    _assert_same_weights(load_encodec(tmp_path / "original.safetensors", config=config), expected)
    folder = tmp_path / "transformers"
    folder.mkdir()
    save_file(_of_transformers(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_transformers_config(config)))
    _assert_same_weights(load_encodec(folder), expected)


def test_pickles_are_read_on_request_only(tmp_path: Path) -> None:
    expected = _random_codec(TINY)
    path = tmp_path / "encodec.th"
    torch.save(_original(expected, "g_and_v"), path)
    with pytest.raises(ValueError, match=r"if you trust it, allow_pickle=True \(--allow-pickle\) reads it"):
        load_encodec(path, config=TINY)
    _assert_same_weights(load_encodec(path, config=TINY, allow_pickle=True), expected)
    folder = tmp_path / "transformers"
    folder.mkdir()
    torch.save(_of_transformers(_original(expected, "parametrized")), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(_transformers_config(TINY)))
    _assert_same_weights(load_encodec(folder, allow_pickle=True), expected)


def test_pickles_run_no_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
            return Path.write_text, (tmp_path / "harm", "done")  # type: ignore[return-value]

    torch.save({"encoder.model.0.conv.conv.bias": Harmful()}, tmp_path / "bad.th")
    with pytest.raises(ValueError, match=r"bad\.th cannot be read"):
        load_encodec(tmp_path / "bad.th", config=TINY, allow_pickle=True)
    assert not (tmp_path / "harm").exists()


def test_a_saved_import_loads(tmp_path: Path) -> None:
    save_file(_original(_random_codec(TINY), "g_and_v"), tmp_path / "original.safetensors")
    codec = load_encodec(tmp_path / "original.safetensors", config=TINY)
    save(codec, tmp_path / "ours", name="tiny@1", dtype="float32")
    audio = _audio(1, 1, 1000)
    assert torch.equal(load(tmp_path / "ours").encode(audio).codes, codec.encode(audio).codes)


def _without(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(key)


def _with(key: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("encoder.model.0.conv.conv.bias"), r"missing \['encoder.layers.0.bias'\], unknown \[\]"),
        (_without("encoder.model.0.conv.conv.weight_g"), "missing the length of encoder.layers.0.weight"),
        (_without("encoder.model.0.conv.conv.weight_v"), "missing the direction of encoder.layers.0.weight"),
        (_without("decoder.model.1.lstm.bias_hh_l0"), r"missing \['decoder.layers.1.lstm.bias_hh_l0'\]"),
        (_without("quantizer.vq.layers.3._codebook.embed"), r"missing \['quantizer.layers.3.codebook.embed'\]"),
        (_without("quantizer.vq.layers.2._codebook.inited"), r"missing \['quantizer.layers.2.codebook.inited'\]"),
        (_with("encoder.model.99.conv.conv.bias", 4), r"unknown \['encoder.model.99.conv.conv.bias'\]"),
        (_with("quantizer.vq.layers.4._codebook.embed", 16, 6), r"unknown \['quantizer.vq.layers.4._codebook.embed'\]"),
        (_with("encoder.model.0.conv.conv.weight", 4, 1, 7), "is there with and without weight norm"),
        (
            _with("encoder.layers.0.conv.bias", 4),
            "(encoder.(model.0.conv.conv|layers.0.conv).bias( and)? ){2}are the same tensor",
        ),
        (_with("encoder.model.0.conv.conv.bias", 5), r"encoder.layers.0.bias is \(5,\), the config asks for \(4,\)"),
        (_with("encoder.model.0.conv.conv.weight_g", 3, 1, 1), "has 3 lengths for 4 directions"),
        (_with("encoder.model.0.conv.conv.weight_v", 4, 1, 7), "encoder.layers.0.weight holds NaN"),
        (
            _with("quantizer.vq.layers.1._codebook.embed", 8, 6),
            r"codebooks are \(8, 6\), the config asks for \(16, 6\)",
        ),
        (_with("quantizer.vq.layers.1._codebook.inited", 1), "quantizer.layers.1.codebook was never trained"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = _original(_random_codec(TINY), "g_and_v")
    change(tensors)
    save_file(tensors, tmp_path / "original.safetensors")
    with pytest.raises(ValueError, match=message):
        load_encodec(tmp_path / "original.safetensors", config=TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "dac"}, "does not describe an EnCodec model"),
        ({"pad_mode": "constant"}, "pad_mode='constant' is not supported, 'reflect' is"),
        ({"trim_right_ratio": 0.5}, r"trim_right_ratio=0.5 is not supported, 1.0 is"),
        ({"codebook_dim": 4}, "codebook_dim=4 is not supported, 6 is"),
        ({"norm_type": "layer_norm"}, "norm_type='layer_norm' is not one of"),
        ({"norm_type": "time_group_norm"}, "need causal=False"),
        ({"chunk_length_s": 1.0, "overlap": None}, r"config\.json: unsupported operand"),
        ({"chunk_length_s": 1.0, "overlap": 0.01}, "segments need causal=False"),
        ({"target_bandwidths": []}, r"config\.json: list index out of range"),
        ({"upsampling_ratios": [0]}, r"config\.json: .*division by zero"),
        ({"num_filters": "4"}, r"config\.json\.num_filters: expected int, got '4'"),
        ({"upsampling_ratios": [2, 3]}, "the config asks for"),
        ({"target_bandwidths": [30.0]}, r"missing \['quantizer.layers.4.codebook.embed'"),
    ],
)
def test_configurations_that_do_not_fit_are_value_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_file(_of_transformers(_original(_random_codec(TINY), "g_and_v")), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(_transformers_config(TINY, **changes)))
    with pytest.raises(ValueError, match=message):
        load_encodec(tmp_path)


def test_sources_that_are_no_checkpoints_are_value_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file"):
        load_encodec(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_encodec(tmp_path)
    with pytest.raises(ValueError, match="config= cannot be given"):
        load_encodec(tmp_path, config=TINY)
    (tmp_path / "config.json").write_text('{"model_type": "encodec"}')
    with pytest.raises(ValueError, match=r"config\.json: \w+ is missing"):
        load_encodec(tmp_path)
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    with pytest.raises(ValueError, match=r"noise\.safetensors cannot be read"):
        load_encodec(tmp_path / "noise.safetensors")
    torch.save([torch.ones(1)], tmp_path / "list.th")
    with pytest.raises(ValueError, match="not a mapping of names to tensors"):
        load_encodec(tmp_path / "list.th", allow_pickle=True)


# Against the packages themselves. Their weight norm rounds otherwise than the folded weights, and they convolve a file
# whole where we go piece by piece: some 1e-7 of the largest value, some ten layers deep.
RELATIVE_TOLERANCE = 1e-5
LENGTHS = [1, 5, 6, 100, 601, 6001, 12007]


def _liven(model: Any, codebooks: list[Tensor], audio: Tensor) -> None:
    """Make random weights behave like trained ones: latents that vary, and codebooks that reach as far as they do.

    A Gaussian codebook of C entries over D dims takes the most of a Gaussian latent at sqrt(2 ln C / D) of its scale.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("weight_g", "original0")):
                parameter *= 2.0
        latents = model.encoder(audio)
        rows = latents.transpose(1, 2).flatten(0, 1)
        for codebook in codebooks:
            size, dim = codebook.shape
            share = min(1.0, (2 * torch.tensor(float(size)).log() / dim).sqrt())
            codebook.copy_(share * rows.std(0) * torch.randn(size, dim) + rows.mean(0))
            rows = rows - codebook[torch.cdist(rows, codebook).argmin(1)]


def _peer(config: SEANetConfig) -> Any:
    """The `encodec` package's model of the same shape, with random weights."""
    encodec = pytest.importorskip("encodec")
    from encodec.modules import SEANetDecoder, SEANetEncoder
    from encodec.quantization import ResidualVectorQuantizer

    quantizer = config.quantizer
    shape: dict[str, Any] = {
        "channels": config.num_channels,
        "dimension": quantizer.latent_dim,
        "n_filters": config.num_filters,
        "ratios": list(config.ratios),
        "lstm": config.num_lstm_layers,
        "norm": {"weight": "weight_norm", "group": "time_group_norm"}[config.norm],
        "causal": config.causal,
    }
    torch.manual_seed(0)
    model = encodec.EncodecModel(
        SEANetEncoder(**shape),
        SEANetDecoder(**shape),
        ResidualVectorQuantizer(quantizer.latent_dim, quantizer.num_stages, quantizer.codebook_size),
        target_bandwidths=[24.0],
        sample_rate=config.sample_rate_hz,
        channels=config.num_channels,
        normalize=config.normalize_loudness,
        segment=config.segment_samples and config.segment_samples / config.sample_rate_hz,
    ).eval()
    entries = [layer._codebook for layer in model.quantizer.vq.layers]
    _liven(model, [entry.embed for entry in entries], _audio(2, config.num_channels, 3 * config.sample_rate_hz))
    for entry in entries:
        entry.inited.fill_(1)
    return model


def _check_parity(
    codec: SEANetCodec, frames: list[tuple[Tensor, Tensor | None]], heard: Tensor, latents: Tensor, audio: Tensor
) -> None:
    """Codes, scales and audio of the peer, frames of segments [B, K, F] one after the other, against ours."""
    num_rows, _, num_samples = audio.shape
    expected = torch.cat([codes for codes, _ in frames], dim=2)
    scales = torch.cat([scale for _, scale in frames if scale is not None], dim=1) if frames[0][1] is not None else None
    tokens = codec.encode(audio)
    assert tokens.codes.shape == expected.shape
    assert_same_codes(tokens.codes, expected, latents, codec.quantizer.codebooks)
    if scales is not None:
        torch.testing.assert_close(tokens.scales, scales, rtol=1e-6, atol=0)  # one float32 mean and root
    given = Tokens(expected, torch.full((num_rows,), num_samples), "", scales=scales)
    loudest = float(heard.abs().max())
    torch.testing.assert_close(codec.decode(given), heard, rtol=0, atol=RELATIVE_TOLERANCE * loudest)


def _segment_latents(codec: SEANetCodec, audio: Tensor) -> Tensor:
    parts = []
    for first, last, _ in codec._segments(audio.shape[2]):
        segment = audio[:, :, first:last]
        if codec.config.normalize_loudness:
            segment = segment / (segment.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt() + 1e-8)
        parts.append(codec.encoder(segment))
    return torch.cat(parts, dim=2)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("config", [TINY, TINY_STEREO], ids=["mono", "stereo"])
@torch.no_grad()
def test_parity_with_encodec(tmp_path: Path, config: SEANetConfig) -> None:
    peer = _peer(config)
    torch.save(peer.state_dict(), tmp_path / "peer.th")
    codec = load_encodec(tmp_path / "peer.th", config=config, allow_pickle=True)
    for num_samples in LENGTHS:
        audio = _audio(3, config.num_channels, num_samples)
        frames = peer.encode(audio)
        heard = peer.decode(frames)[:, :, :num_samples]
        _check_parity(codec, frames, heard, _segment_latents(codec, audio), audio)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("config", "num_samples"), [(ENCODEC_24KHZ, 4801), (ENCODEC_48KHZ, 49000)], ids=["24khz", "48khz"]
)
@torch.no_grad()
def test_parity_with_encodec_at_full_size(tmp_path: Path, config: SEANetConfig, num_samples: int) -> None:
    peer = _peer(config)
    torch.save(peer.state_dict(), tmp_path / "peer.th")
    codec = load_encodec(tmp_path / "peer.th", allow_pickle=True)
    assert codec.config == config
    audio = _audio(1, config.num_channels, num_samples)
    frames = peer.encode(audio)
    heard = peer.decode(frames)[:, :, :num_samples]
    _check_parity(codec, frames, heard, _segment_latents(codec, audio), audio)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["mono", "stereo", "musicgen"])
@torch.no_grad()
def test_parity_with_transformers(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = {"mono": TINY, "stereo": TINY_STEREO}.get(kind, TINY)
    changes = {"use_causal_conv": False, "use_conv_shortcut": False} if kind == "musicgen" else {}
    torch.manual_seed(0)
    peer = transformers.EncodecModel(transformers.EncodecConfig(**_transformers_config(config, **changes))).eval()
    entries = [layer.codebook.embed for layer in peer.quantizer.layers]
    _liven(peer, entries, _audio(2, config.num_channels, 24000))
    peer.save_pretrained(tmp_path)
    codec = load_encodec(tmp_path)
    if kind != "musicgen":
        assert codec.config == config
    bandwidth = peer.config.target_bandwidths[-1]
    for num_samples in LENGTHS:
        audio = _audio(3, config.num_channels, num_samples)
        encoded = peer.encode(audio, bandwidth=bandwidth)
        num_frames = [codes.shape[2] for codes in encoded.audio_codes]
        num_frames[-1] -= encoded.last_frame_pad_length
        frames = [
            (codes[:, :, :count], scale)
            for codes, count, scale in zip(encoded.audio_codes, num_frames, encoded.audio_scales, strict=True)
        ]
        heard = peer.decode(
            encoded.audio_codes, encoded.audio_scales, last_frame_pad_length=encoded.last_frame_pad_length
        ).audio_values[:, :, :num_samples]
        _check_parity(codec, frames, heard, _segment_latents(codec, audio), audio)
