import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from margins import assert_same_split_codes
from moshi_peer import import_moshi, moshi_mimi
from safetensors.torch import save_file
from torch import Tensor

from codec.importers.mimi import load_mimi
from codec.models.mimi import MimiCodec, MimiConfig
from codec.pretrained import load, save
from codec.quantizers.split import SplitVQ, SplitVQConfig
from codec.testing import speech_like
from codec.tokens import Tokens

TINY = MimiConfig(
    sample_rate_hz=8000,
    quantizer=SplitVQConfig(latent_dim=8, num_stages=4, codebook_size=16, codebook_dim=6),
    ratios=(3, 2),
    num_filters=4,
    num_layers=2,
    num_heads=2,
    feedforward_dim=12,
    window=7,
)
HOP = 12
# The published network, but narrow.
THIN = MimiConfig(
    quantizer=SplitVQConfig(latent_dim=32, num_stages=8, codebook_size=64, codebook_dim=16),
    num_filters=4,
    num_heads=4,
    feedforward_dim=48,
)


def _random_codec(config: MimiConfig) -> MimiCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = MimiCodec(config).requires_grad_(False)
        for name, value in codec.named_parameters():
            if name.endswith("_scale"):
                value.add_(torch.rand_like(value))
    return codec


def _audio(num_rows: int, num_samples: int) -> Tensor:
    return torch.stack([torch.from_numpy(speech_like(num_samples, seed=seed)) for seed in range(num_rows)])[:, None]


# From our names to those of the published file, in this order; and from those to the names of `transformers`.
_TO_ORIGINAL = (
    (r"^encoder\.layers\.0\.layers\.(.*)\.(weight|bias)$", r"encoder.model.\1.conv.conv.\2"),
    (r"^decoder\.layers\.2\.layers\.(2|5)\.(weight|bias)$", r"decoder.model.\1.convtr.convtr.\2"),
    (r"^decoder\.layers\.2\.layers\.(.*)\.(weight|bias)$", r"decoder.model.\1.conv.conv.\2"),
    (r"\.branch\.layers\.", ".block."),
    (r"^encoder\.layers\.2\.", "downsample.conv.conv.conv."),
    (r"^decoder\.layers\.0\.", "upsample.convtr.convtr.convtr."),
    (r"^(encoder|decoder)\.layers\.1\.", r"\1_transformer.transformer."),
    (r"\.qkv\.weight$", ".self_attn.in_proj_weight"),
    (r"\.out\.weight$", ".self_attn.out_proj.weight"),
    (r"\.attention_norm\.", ".norm1."),
    (r"\.feedforward_norm\.", ".norm2."),
    (r"\.expand\.", ".linear1."),
    (r"\.project\.", ".linear2."),
    (r"\.attention_scale$", ".layer_scale_1.scale"),
    (r"\.feedforward_scale$", ".layer_scale_2.scale"),
    (r"^quantizer\.semantic\.", "quantizer.rvq_first."),
    (r"^quantizer\.acoustic\.", "quantizer.rvq_rest."),
)
_TO_TRANSFORMERS = (
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"^downsample\.conv\.conv\.", "downsample."),
    (r"^upsample\.convtr\.convtr\.convtr\.", "upsample.conv."),
    (r"\.(conv\.conv|convtr\.convtr)\.", ".conv."),
    (r"_transformer\.transformer\.", "_transformer."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.norm1\.", ".input_layernorm."),
    (r"\.norm2\.", ".post_attention_layernorm."),
    (r"\.linear1\.", ".mlp.fc1."),
    (r"\.linear2\.", ".mlp.fc2."),
    (r"\.layer_scale_1\.", ".self_attn_layer_scale."),
    (r"\.layer_scale_2\.", ".mlp_layer_scale."),
    (r"\.rvq_first\.", ".semantic_residual_vector_quantizer."),
    (r"\.rvq_rest\.", ".acoustic_residual_vector_quantizer."),
    (r"\.vq\.layers\.(\d+)\._codebook\._?", r".layers.\1.codebook."),
    (r"\.embedding_sum$", ".embed_sum"),
)


def _renamed(name: str, renamings: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renamings:
        name = re.sub(pattern, replacement, name)
    return name


def _original(codec: MimiCodec) -> dict[str, Tensor]:
    """The tensors of the same model in the layout of the file that the `moshi` package reads."""
    found: dict[str, Tensor] = {}
    for key, value in codec.state_dict().items():
        name = _renamed(key, _TO_ORIGINAL)
        if name.endswith(".vq.codebooks"):
            for stage, entries in enumerate(value):
                prefix = f"{name.removesuffix('codebooks')}layers.{stage}._codebook"
                usage = 0.5 * torch.arange(len(entries))  # the first of them was never chosen
                found[f"{prefix}._initialized"] = torch.ones(1)
                found[f"{prefix}.cluster_usage"] = usage
                found[f"{prefix}.embedding_sum"] = entries * usage.clamp(min=1e-5)[:, None]
        else:
            found[name] = value[:, :, None] if re.search(r"quantizer.*put_proj", name) else value
    return found


def _of_transformers(tensors: dict[str, Tensor], num_heads: int = TINY.num_heads) -> dict[str, Tensor]:
    """The same state dict as `transformers` would write it."""
    found = {}
    for key, value in tensors.items():
        name = _renamed(key, _TO_TRANSFORMERS)
        if not name.endswith(".in_proj_weight"):
            found[name] = value
            continue
        for part, weight in zip("qkv", value.chunk(3), strict=True):
            if part != "v":  # dims 2 i and 2 i + 1 of a head become i and i + D / 2
                heads = weight.unflatten(0, (num_heads, -1))
                weight = torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).flatten(0, 1)
            found[f"{name.removesuffix('in_proj_weight')}{part}_proj.weight"] = weight.contiguous()
    return found


def _transformers_config(config: MimiConfig, **changes: Any) -> dict[str, Any]:
    """As `transformers` 4 and the published model write it; version 5 leaves out what follows from the rest."""
    quantizer = config.quantizer
    assert isinstance(quantizer, SplitVQConfig)
    values = {
        "model_type": "mimi",
        "attention_bias": False,
        "audio_channels": config.num_channels,
        "codebook_dim": quantizer.codebook_dim,
        "codebook_size": quantizer.codebook_size,
        "compress": config.compress,
        "dilation_growth_rate": config.dilation_base,
        "frame_rate": config.sample_rate_hz / config.hop_length,
        "head_dim": quantizer.latent_dim // config.num_heads,
        "hidden_act": "gelu",
        "hidden_size": quantizer.latent_dim,
        "intermediate_size": config.feedforward_dim,
        "kernel_size": config.kernel_size,
        "last_kernel_size": config.last_kernel_size,
        "layer_scale_initial_scale": config.initial_scale,
        "norm_eps": 1e-5,
        "num_attention_heads": config.num_heads,
        "num_filters": config.num_filters,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_heads,
        "num_quantizers": quantizer.num_stages,
        "num_residual_layers": config.num_residual_blocks,
        "num_semantic_quantizers": 1,
        "pad_mode": "constant",
        "residual_kernel_size": config.residual_kernel_size,
        "rope_theta": config.rope_base,
        "sampling_rate": config.sample_rate_hz,
        "sliding_window": config.window,
        "trim_right_ratio": 1.0,
        "upsample_groups": quantizer.latent_dim,
        "upsampling_ratios": list(config.ratios),
        "use_causal_conv": True,
        "use_conv_shortcut": False,
        "vector_quantization_hidden_dimension": quantizer.codebook_dim,
    }
    return values | changes


def _assert_same_weights(codec: MimiCodec, expected: MimiCodec) -> None:
    theirs = expected.state_dict()
    assert codec.config == expected.config
    assert not codec.training
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    for key, value in codec.state_dict().items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=0)  # sum / usage rounds


def test_files_of_either_layout(tmp_path: Path) -> None:
    expected = _random_codec(TINY)
    tensors = _original(expected)
    save_file(tensors, tmp_path / "original.safetensors")
    _assert_same_weights(load_mimi(tmp_path / "original.safetensors", config=TINY), expected)
    torch.save({"model": tensors}, tmp_path / "trained.th")
    _assert_same_weights(load_mimi(tmp_path / "trained.th", config=TINY, allow_pickle=True), expected)
    folder = tmp_path / "transformers"
    folder.mkdir()
    save_file(_of_transformers(tensors), folder / "model.safetensors")
    _assert_same_weights(load_mimi(folder / "model.safetensors", config=TINY), expected)
    (folder / "config.json").write_text(json.dumps(_transformers_config(TINY)))
    _assert_same_weights(load_mimi(folder), expected)


def test_other_names_for_the_same_tensors(tmp_path: Path) -> None:
    """Those that the `moshi` package takes, too, and those that it has for them itself."""
    aliases = (
        (r"\.in_proj_weight$", ".in_projs.0.weight"),
        (r"\.out_proj\.", ".out_projs.0."),
        (r"\._initialized$", ".inited"),
        (r"\.cluster_usage$", ".cluster_size"),
        (r"\.embedding_sum$", ".embed_avg"),
    )
    expected = _random_codec(TINY)
    save_file({_renamed(k, aliases): v for k, v in _original(expected).items()}, tmp_path / "aliases.safetensors")
    _assert_same_weights(load_mimi(tmp_path / "aliases.safetensors", config=TINY), expected)


def test_pickles_are_read_on_request_only(tmp_path: Path) -> None:
    torch.save({"model": _original(_random_codec(TINY))}, tmp_path / "trained.th")
    with pytest.raises(ValueError, match=r"if you trust it, allow_pickle=True \(--allow-pickle\) reads it"):
        load_mimi(tmp_path / "trained.th", config=TINY)


def test_a_saved_import_loads(tmp_path: Path) -> None:
    save_file(_original(_random_codec(TINY)), tmp_path / "original.safetensors")
    codec = load_mimi(tmp_path / "original.safetensors", config=TINY)
    save(codec, tmp_path / "ours", name="tiny@1", dtype="float32")
    audio = _audio(1, 1000)
    assert torch.equal(load(tmp_path / "ours").encode(audio).codes, codec.encode(audio).codes)


def _without(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(key)


def _with(key: str, *shape: int, value: float = 0.0) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: torch.full(shape, value)})


_LAYER = "encoder_transformer.layers.0"
_CODEBOOK = "quantizer.acoustic_residual_vector_quantizer.layers.1.codebook"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("encoder.layers.0.conv.bias"), r"missing \['encoder.layers.0.layers.0.bias'\], unknown \[\]"),
        (
            _without(f"{_LAYER}.self_attn.k_proj.weight"),
            r"missing \['encoder.layers.1.layers.0.self_attn.k_proj.weight",
        ),
        (_without(f"{_LAYER}.self_attn.q_proj.weight"), r"missing \['encoder.layers.1.layers.0.qkv.weight'\], unknown"),
        (_without(f"{_CODEBOOK}.embed_sum"), r"missing \['quantizer.acoustic.layers.1.codebook.embed_sum'\]"),
        (_without("upsample.conv.weight"), r"missing \['decoder.layers.0.weight'\]"),
        (_with("encoder.layers.9.conv.bias", 4), r"unknown \['encoder.layers.9.conv.bias'\]"),
        (_with(f"{_CODEBOOK[:-10]}3.codebook.embed_sum", 16, 6), r"unknown \['quantizer.acoustic_residual.*3.codebook"),
        (_with("encoder.model.0.conv.conv.bias", 4), "are the same tensor"),
        (_with("encoder.layers.0.conv.bias", 5), r"layers.0.bias is \(5,\), the config asks for \(4,\)"),
        (_with("downsample.conv.weight", 8, 8, 6), r"\(8, 8, 6\), the config asks for \(8, 8, 4\)"),
        (_with(f"{_LAYER}.self_attn.v_proj.weight", 4, 8), r"v_proj.weight is \(4, 8\), the config asks for \(8, 8\)"),
        (_with(f"{_CODEBOOK}.embed_sum", 16, 5), r"embed_sum is \(16, 5\), the config asks for \(16, 6\)"),
        (_with(f"{_CODEBOOK}.cluster_usage", 1, value=1.0), r"cluster_usage is \(1,\), the config asks for \(16,\)"),
        (_with(f"{_CODEBOOK}.initialized", 1), "quantizer.acoustic.layers.1.codebook was never trained"),
        (_with(f"{_LAYER}.mlp.fc1.weight", 12, 8, value=float("nan")), "expand.weight holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = _of_transformers(_original(_random_codec(TINY)))
    change(tensors)
    save_file(tensors, tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match=message):
        load_mimi(tmp_path / "some.safetensors", config=TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "encodec"}, "does not describe a Mimi model"),
        ({"use_causal_conv": False}, "use_causal_conv=False is not supported, True is"),
        ({"pad_mode": "reflect"}, "pad_mode='reflect' is not supported, 'constant' is"),
        ({"num_semantic_quantizers": 2}, "num_semantic_quantizers=2 is not supported, 1 is"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 is not supported, 2 is"),
        ({"upsample_groups": 1}, "upsample_groups=1 is not supported, 8 is"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "only the default kind is supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "only the default kind is supported"),
        ({"frame_rate": 500.0}, "frame_rate=500.0 does not divide the rate"),
        ({"num_attention_heads": 0}, r"config\.json: .*division.* by zero"),
        ({"hidden_size": "8"}, r"config\.json: unsupported operand"),
        ({"num_filters": "4"}, r"config\.json\.num_filters: expected int, got '4'"),
        ({"sliding_window": 0}, "window must be positive, got 0"),
        ({"upsampling_ratios": [2, 2], "frame_rate": 1000.0}, "the config asks for"),
        ({"num_quantizers": 5}, r"missing \['quantizer.acoustic.layers.3.codebook.initialized'"),
    ],
)
def test_configurations_that_do_not_fit_are_value_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_file(_of_transformers(_original(_random_codec(TINY))), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(_transformers_config(TINY, **changes)))
    with pytest.raises(ValueError, match=message):
        load_mimi(tmp_path)


def test_sources_that_are_no_checkpoints_are_value_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file"):
        load_mimi(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_mimi(tmp_path)
    with pytest.raises(ValueError, match="config= cannot be given"):
        load_mimi(tmp_path, config=TINY)
    (tmp_path / "config.json").write_text('{"model_type": "mimi"}')
    with pytest.raises(ValueError, match=r"config\.json: \w+ is missing"):
        load_mimi(tmp_path)
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    with pytest.raises(ValueError, match=r"noise\.safetensors cannot be read"):
        load_mimi(tmp_path / "noise.safetensors")
    torch.save([torch.ones(1)], tmp_path / "list.th")
    with pytest.raises(ValueError, match="not a mapping of names to tensors"):
        load_mimi(tmp_path / "list.th", allow_pickle=True)


# Against the packages themselves. They convolve in other products, and work out angles in float32: some 1e-7 of the
# largest value per layer.
RELATIVE_TOLERANCE = 1e-5


def _liven(model: Any, codebook_parts: tuple[str, str]) -> None:
    """Make random weights behave like trained ones: latents that vary, transformers that matter, codebooks that fit."""
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    usage, total = codebook_parts
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("scale"):
                value.copy_(0.3 + 0.1 * noise(value))
            elif value.dim() > 1:
                value.copy_(1.2 * noise(value) * value[0].numel() ** -0.5)
            else:
                value.add_(0.02 * noise(value))
        for name, value in model.named_buffers():
            if name.endswith(f".{usage}"):
                value.copy_(noise(value).abs())
                value[0] = 0.0
            elif name.endswith(f".{total}"):
                value.copy_(0.5 * noise(value))
            elif name.endswith("initialized"):
                value.fill_(1.0)
        # An entry that was never chosen would be far off, as its sum is divided by almost nothing: keep it, but small.
        for name, value in model.named_buffers():
            if name.endswith(f".{total}"):
                value[0] *= 1e-5


def _split(codec: MimiCodec) -> SplitVQ:
    assert isinstance(codec.quantizer, SplitVQ)
    return codec.quantizer


def _assert_close(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=0, atol=RELATIVE_TOLERANCE * float(expected.abs().max()))


def _moshi(config: MimiConfig | None = None) -> Any:
    model = moshi_mimi(config)
    _liven(model, ("cluster_usage", "embedding_sum"))
    return model


def _of_moshi(model: Any, config: MimiConfig | None, folder: Path) -> MimiCodec:
    save_file(model.state_dict(), folder / "moshi.safetensors")
    return load_mimi(folder / "moshi.safetensors", config=config)


def _transformers(config: MimiConfig, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    model = transformers.MimiModel(transformers.MimiConfig(**_transformers_config(config, **changes))).eval()
    _liven(model, ("cluster_usage", "embed_sum"))
    return model


@pytest.mark.peer
@pytest.mark.parametrize("config", [TINY, THIN], ids=["tiny", "thin"])
@torch.no_grad()
def test_parity_with_transformers(tmp_path: Path, config: MimiConfig) -> None:
    peer = _transformers(config)
    peer.save_pretrained(tmp_path)
    codec = load_mimi(tmp_path)
    assert codec.config == config
    for num_frames in (1, 2, 9, 130):  # past the window, too
        audio = _audio(2, num_frames * config.hop_length)
        expected = peer.encode(audio).audio_codes
        latents = peer.encoder(audio).latents
        _assert_close(codec.analyze(audio), latents)
        assert_same_split_codes(codec.encode(audio).codes, expected, latents, _split(codec))
        rows = len(codec.codebook_sizes) - 1
        assert_same_split_codes(
            codec.encode(audio, num_quantizers=rows).codes,
            peer.encode(audio, num_quantizers=rows).audio_codes,
            latents,
            _split(codec),
        )
        for codes in (expected, expected[:, :rows], expected[:, :1]):
            given = Tokens(codes, torch.full((2,), audio.shape[2]), "")
            _assert_close(codec.decode(given), peer.decode(codes).audio_values)


@pytest.mark.peer
@torch.no_grad()
def test_of_a_partial_frame_transformers_differs(tmp_path: Path) -> None:
    """It pads each layer's input, where we pad the audio, as the `moshi` package does: that frame's latents differ."""
    peer = _transformers(TINY)
    peer.save_pretrained(tmp_path)
    codec, moshi = load_mimi(tmp_path), _moshi(TINY)
    audio = _audio(1, 9 * HOP + 5)
    ours, theirs = codec.analyze(audio), peer.encoder(audio).latents
    _assert_close(ours[:, :, :9], theirs[:, :, :9])
    assert (ours[:, :, 9] - theirs[:, :, 9]).abs().max() > 0.01
    of_moshi = _of_moshi(moshi, TINY, tmp_path)
    _assert_close(of_moshi.analyze(audio), moshi.encode_to_latent(audio, quantize=False))


@pytest.mark.peer
@pytest.mark.parametrize("config", [TINY, THIN], ids=["tiny", "thin"])
@torch.no_grad()
def test_parity_with_moshi(tmp_path: Path, config: MimiConfig) -> None:
    peer = _moshi(config)
    codec = _of_moshi(peer, config, tmp_path)
    for num_samples in (1, config.hop_length, 9 * config.hop_length + 5, 130 * config.hop_length):
        audio = _audio(2, num_samples)
        latents = peer.encode_to_latent(audio, quantize=False)
        _assert_close(codec.analyze(audio), latents)
        codes = peer.encode(audio)
        assert_same_split_codes(codec.encode(audio).codes, codes, latents, _split(codec))
        given = Tokens(codes, torch.full((2,), num_samples), "")
        _assert_close(codec.decode(given), peer.decode(codes)[:, :, :num_samples])


@pytest.mark.peer
@torch.no_grad()
def test_parity_with_moshi_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = _moshi()
    monkeypatch.setattr("codec.importers.mimi.read_checkpoint", lambda path, **_: peer.state_dict())  # 400 MB
    codec = load_mimi("tokenizer-e351c8d8-checkpoint125.safetensors")
    assert codec.config == MimiConfig()
    audio = _audio(1, 2 * codec.hop_length)
    latents = peer.encode_to_latent(audio, quantize=False)
    codes = peer.encode(audio)
    assert_same_split_codes(codec.encode(audio).codes, codes, latents, _split(codec))
    given = Tokens(codes[:, :8], torch.tensor([audio.shape[2]]), "")
    _assert_close(codec.decode(given), peer.decode(codes[:, :8]))


def _streamed(model: Any, call: Callable[[Tensor], Tensor], pieces: tuple[Tensor, ...], num_kept: int) -> Tensor:
    """What the package's streaming mode gives for pieces, its attention keeping the last `num_kept` rows."""
    caches = import_moshi().transformer
    with model.streaming(len(pieces[0])):
        for module in model.modules():
            if isinstance(module, caches.StreamingMultiheadAttention):
                before = module._streaming_state.kv_cache
                shape = (before.cache.shape[1], before.cache.shape[2], before.cache.shape[4])
                assert before.capacity == TINY.window
                module._streaming_state.kv_cache = caches.RingKVCache(
                    *shape, num_kept, device=torch.device("cpu"), dtype=torch.float32
                )
        return torch.cat([call(piece) for piece in pieces], dim=2)


@pytest.mark.peer
@torch.no_grad()
def test_streams_of_moshi_are_ours_until_its_cache_is_full(tmp_path: Path) -> None:
    """Frame by frame. Its cache holds as many rows as the window, and takes both rows of a frame before the first of
    them attends: that one then lacks the oldest row of its window. With room for one row more, streams stay equal to
    files, and to ours.
    """
    peer = _moshi(TINY)
    codec = _of_moshi(peer, TINY, tmp_path)
    audio = _audio(2, 30 * HOP)
    codes = peer.encode(audio)

    def latents(piece: Tensor) -> Tensor:
        found: Tensor = peer.encode_to_latent(piece, quantize=False)
        return found

    for call, whole, step, state in (
        (latents, audio, codec.encoder.step, codec.encoder.init_state(2)),
        (peer.decode, codes, codec.decode_step, codec.decode_init(2)),
    ):
        expected, pieces, ours = call(whole), whole.split(whole.shape[2] // 30, dim=2), []
        for piece in pieces:
            part, state = step(piece, state)
            ours.append(part)
        _assert_close(torch.cat(ours, dim=2), expected)
        _assert_close(_streamed(peer, call, pieces, TINY.window + 1), expected)
        theirs = _streamed(peer, call, pieces, TINY.window)
        num_equal = TINY.window // 2 * expected.shape[2] // 30  # so many whole frames fit in the cache
        _assert_close(theirs[:, :, :num_equal], expected[:, :, :num_equal])
        assert (theirs - expected)[:, :, num_equal:].abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.peer
@torch.no_grad()
def test_streams_of_transformers_are_ours(tmp_path: Path) -> None:
    """Of its encoder, frame by frame; its decoder cannot stream, for its convolutions keep nothing."""
    peer = _transformers(TINY)
    peer.save_pretrained(tmp_path)
    codec = load_mimi(tmp_path)
    audio, parts = _audio(2, 30 * HOP), []
    past = cache = None
    for piece in audio.split(HOP, dim=2):
        out = peer.encode(piece, use_streaming=True, encoder_past_key_values=past, padding_cache=cache)
        past, cache = out.encoder_past_key_values, out.padding_cache
        parts.append(out.audio_codes)
    codes = codec.encode(audio).codes
    assert_same_split_codes(codes, torch.cat(parts, dim=2), codec.analyze(audio), _split(codec))
