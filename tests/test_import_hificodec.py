"""HiFi-Codec has no package, so the reference is built here, from the facts of SPECS.md sections 1.2 to 1.4 and 1.7."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from margins import assert_same_codes
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from codec.importers import hificodec as importer
from codec.importers.hificodec import load_hificodec, read_config
from codec.models.hificodec import (
    HIFICODEC_16K_320D,
    HIFICODEC_24K_240D,
    HIFICODEC_24K_320D,
    HiFiCodec,
    HiFiCodecConfig,
)
from codec.pretrained import load, save
from codec.quantizers.residual import ResidualVQConfig
from codec.testing import speech_like
from codec.tokens import Tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")

# Both odd kernels and strides that are published, 11/5 and 7/3.
TINY = HiFiCodecConfig(
    sample_rate_hz=16000,
    quantizer=ResidualVQConfig(latent_dim=12, num_stages=2, num_groups=2, codebook_size=16, learning="gradient"),
    ratios=(5, 3, 2),
    kernel_sizes=(11, 7, 4),
    encoder_channels=8,
    decoder_channels=16,
)
SPELLINGS = ["g_and_v", "parametrized", "folded"]
# Weight norm rounds otherwise than folded weights do: some 1e-7 of the largest value, some forty layers deep.
RELATIVE_TOLERANCE = 1e-5


class _ResBlock(nn.Module):
    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]) -> None:
        super().__init__()

        def convolution(dilation: int) -> nn.Module:
            padding = (kernel_size - 1) * dilation // 2
            return weight_norm(nn.Conv1d(channels, channels, kernel_size, dilation=dilation, padding=padding))

        self.convs1 = nn.ModuleList([convolution(dilation) for dilation in dilations])
        self.convs2 = nn.ModuleList([convolution(1) for _ in dilations])

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, 0.1)), 0.1))
        return x


class _Encoder(nn.Module):
    def __init__(self, config: HiFiCodecConfig) -> None:
        super().__init__()
        self.conv_pre = weight_norm(nn.Conv1d(1, config.encoder_channels, 7, padding=3))
        self.ups, self.resblocks, self.normalize = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width = config.encoder_channels
        for ratio, kernel_size in list(zip(config.ratios, config.kernel_sizes, strict=True))[::-1]:
            padding = (kernel_size - ratio) // 2
            self.ups.append(weight_norm(nn.Conv1d(width, 2 * width, kernel_size, ratio, padding)))
            width *= 2
            for residual_kernel_size in reversed(config.residual_kernel_sizes):
                self.resblocks.append(_ResBlock(width, residual_kernel_size, config.residual_dilations))
                self.normalize.append(nn.GroupNorm(width // 16, width, eps=1e-6))
        self.conv_post = nn.Conv1d(width, config.quantizer.latent_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_pre(x)
        num_blocks = len(self.resblocks) // len(self.ups)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            total: Any = None
            for j in range(i * num_blocks, (i + 1) * num_blocks):
                block = self.resblocks[j](x)
                total = self.normalize[j](block if total is None else total + block)
            x = total / num_blocks
        return self.conv_post(F.leaky_relu(x))


class _Generator(nn.Module):
    def __init__(self, config: HiFiCodecConfig) -> None:
        super().__init__()
        width = config.decoder_channels
        self.conv_pre = weight_norm(nn.Conv1d(config.quantizer.latent_dim, width, 7, padding=3))
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for ratio, kernel_size in zip(config.ratios, config.kernel_sizes, strict=True):
            padding = (kernel_size - ratio) // 2
            self.ups.append(weight_norm(nn.ConvTranspose1d(width, width // 2, kernel_size, ratio, padding)))
            width //= 2
            for residual_kernel_size in config.residual_kernel_sizes:
                self.resblocks.append(_ResBlock(width, residual_kernel_size, config.residual_dilations))
        self.conv_post = weight_norm(nn.Conv1d(width, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_pre(x)
        num_blocks = len(self.resblocks) // len(self.ups)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            x = sum(self.resblocks[i * num_blocks + j](x) for j in range(num_blocks)) / num_blocks
        return torch.tanh(self.conv_post(F.leaky_relu(x)))


class _Codebook(nn.Module):
    def __init__(self, config: ResidualVQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.latent_dim // config.num_groups)


class _Quantizer(nn.Module):
    def __init__(self, config: ResidualVQConfig) -> None:
        super().__init__()
        self.quantizer_modules = nn.ModuleList([_Codebook(config) for _ in range(config.num_groups)])
        self.quantizer_modules2 = nn.ModuleList([_Codebook(config) for _ in range(config.num_groups)])

    def codebooks(self) -> list[Tensor]:
        books: list[Any] = [*self.quantizer_modules, *self.quantizer_modules2]
        return [book.embedding.weight for book in books]

    def encode(self, x: Tensor) -> Tensor:
        """[B, D, F] -> [B, F, 4]: layer 0 group 0, layer 0 group 1, layer 1 group 0, layer 1 group 1."""
        rest, codes = x.transpose(1, 2), []
        num_groups = len(self.quantizer_modules)
        for layer in (self.quantizer_modules, self.quantizer_modules2):
            chosen = []
            for part, book in zip(rest.chunk(num_groups, dim=2), layer, strict=True):
                weight: Any = book.embedding.weight
                codes.append((part[:, :, None] - weight).square().sum(3).argmin(2))
                chosen.append(weight[codes[-1]])
            rest = rest - torch.cat(chosen, dim=2)
        return torch.stack(codes, dim=2)

    def embed(self, codes: Tensor) -> Tensor:
        entries = [book[codes[:, :, row]] for row, book in enumerate(self.codebooks())]
        num_groups = len(self.quantizer_modules)
        layers = [torch.cat(entries[i : i + num_groups], dim=2) for i in range(0, len(entries), num_groups)]
        return torch.stack(layers).sum(0).transpose(1, 2)


class _Reference:
    """The published model, with random weights that behave like trained ones."""

    def __init__(self, config: HiFiCodecConfig, *, liven: bool = True) -> None:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            self.encoder, self.generator = _Encoder(config).eval(), _Generator(config).eval()
            self.quantizer = _Quantizer(config.quantizer)
            for name, value in [*self.encoder.named_parameters(), *self.generator.named_parameters()]:
                value *= 2.0 if name.endswith("weight_g") else 1.0
                if "normalize" in name:  # ones and zeros at first
                    value += 0.3 * torch.randn_like(value)
            if liven:
                self._liven_codebooks(config)

    def _liven_codebooks(self, config: HiFiCodecConfig) -> None:
        rows = self.encoder(_audio(1, 300 * config.hop_length))[0].T
        groups = list(rows.chunk(config.quantizer.num_groups, dim=1))
        for row, codebook in enumerate(self.quantizer.codebooks()):
            group = row % config.quantizer.num_groups
            rest = groups[group]
            reach = min(1.0, (2 * torch.tensor(float(len(codebook))).log() / codebook.shape[1]).sqrt())
            codebook.copy_(reach * rest.std(0) * torch.randn_like(codebook) + rest.mean(0))
            groups[group] = rest - codebook[torch.cdist(rest, codebook).argmin(1)]

    def parts(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "encoder": self.encoder, "quantizer": self.quantizer}

    def state_dicts(self, spelling: str = "g_and_v") -> dict[str, dict[str, Tensor]]:
        return {name: _spelled(part.state_dict(), spelling) for name, part in self.parts().items()}


def _spelled(tensors: dict[str, Tensor], spelling: str) -> dict[str, Tensor]:
    """The same weights with weight norm written otherwise."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if spelling == "folded" and key.endswith("weight_v"):
            length = tensors[key.removesuffix("v") + "g"]
            found[key.removesuffix("_v")] = torch._weight_norm(value, length, 0)
        elif spelling == "parametrized" and key.endswith(("weight_g", "weight_v")):
            half = "original0" if key.endswith("g") else "original1"
            found[f"{key.removesuffix('weight_g').removesuffix('weight_v')}parametrizations.weight.{half}"] = value
        elif spelling != "folded" or not key.endswith("weight_g"):
            found[key] = value
    return found


def _flat(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}.{key}": value.contiguous() for part, tensors in parts.items() for key, value in tensors.items()}


def _audio(num_rows: int, num_samples: int) -> Tensor:
    return torch.stack([torch.from_numpy(speech_like(num_samples, seed=seed))[None] for seed in range(num_rows)])


@functools.cache
def _tiny_reference() -> _Reference:
    return _Reference(TINY)


def _check_parity(codec: HiFiCodec, reference: _Reference, audio: Tensor) -> None:
    """Codes and audio of whole frames against the reference's."""
    latents = reference.encoder(audio)
    expected = reference.quantizer.encode(latents).transpose(1, 2)
    codes, num_groups = codec.encode(audio).codes, codec.config.quantizer.num_groups
    for group, part in enumerate(latents.chunk(num_groups, dim=1)):  # each is a residual chain of its own
        at = slice(group, None, num_groups)
        assert_same_codes(codes[:, at], expected[:, at], part, codec.quantizer.codebooks[at])
    heard = reference.generator(reference.quantizer.embed(expected.transpose(1, 2)))
    tokens = Tokens(expected, torch.full((len(audio),), audio.shape[2]), "")
    loudest = float(heard.abs().max())
    torch.testing.assert_close(codec.decode(tokens), heard, rtol=0, atol=RELATIVE_TOLERANCE * loudest)


@pytest.mark.parametrize("spelling", SPELLINGS)
@torch.no_grad()
def test_parity(tmp_path: Path, spelling: str) -> None:
    save_file(_flat(_tiny_reference().state_dicts(spelling)), tmp_path / "g.safetensors")
    codec = load_hificodec(tmp_path / "g.safetensors", config=TINY)
    assert not codec.training
    assert not any(value.requires_grad for value in codec.parameters())
    for num_frames in (1, 2, 7, 40, 300):
        _check_parity(codec, _tiny_reference(), _audio(3, num_frames * TINY.hop_length))


@torch.no_grad()
def test_a_partial_frame_is_one_frame_more_than_published() -> None:
    audio = _audio(1, 40 * TINY.hop_length + 7)
    assert _tiny_reference().encoder(audio).shape[2] == 40
    codec = HiFiCodec(TINY)
    assert codec.encode(audio).codes.shape[2] == codec.num_frames_for(audio.shape[2]) == 41


@torch.no_grad()
def test_parity_at_full_size(tmp_path: Path) -> None:
    reference = _Reference(HIFICODEC_24K_240D, liven=False)
    for row, codebook in enumerate(reference.quantizer.codebooks()):
        codebook.normal_(0, 0.3 / (1 + row // 2), generator=torch.Generator().manual_seed(row))
    assert [f"{sum(v.numel() for v in part.parameters()) / 1e6:.2f}" for part in reference.parts().values()] == [
        "15.35", "47.22", "1.05"
    ]  # fmt: skip
    torch.save(reference.state_dicts(), tmp_path / "g_00000000")
    codec = load_hificodec(tmp_path / "g_00000000", allow_pickle=True)
    assert codec.config == HIFICODEC_24K_240D
    _check_parity(codec, reference, _audio(1, 20 * 240))


@pytest.mark.parametrize(
    ("kernel_sizes", "sample_rate_hz", "expected"),
    [
        ((16, 11, 8, 4), 16000, HIFICODEC_16K_320D),
        ((16, 11, 8, 4), 24000, HIFICODEC_24K_320D),
        ((16, 11, 7, 4), 24000, HIFICODEC_24K_240D),
        ((16, 11, 7, 4), None, HIFICODEC_24K_240D),
        ((16, 11, 8, 4), None, "may be a model for 16000 or 24000 Hz; sample_rate_hz must say which"),
        ((16, 11, 8, 4), 8000, "is a model for 16000 or 24000 Hz, not for 8000 Hz"),
        ((16, 11, 7, 4), 16000, "is a model for 24000 Hz, not for 16000 Hz"),
        ((11, 7, 4), 16000, r"has kernels \(11, 7, 4\), as no published HiFi-Codec has; its config must be given"),
        ((), None, r"has kernels \(\), as no published HiFi-Codec has"),
    ],
)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_kernels_tell_published_models_apart(
    tmp_path: Path,
    kernel_sizes: tuple[int, ...],
    sample_rate_hz: int | None,
    expected: HiFiCodecConfig | str,
    spelling: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = {"g_and_v": "weight_v", "parametrized": "parametrizations.weight.original1", "folded": "weight"}[spelling]
    tensors = {f"generator.ups.{i}.{name}": torch.zeros(2, 1, size) for i, size in enumerate(kernel_sizes)}
    save_file({"encoder.conv_pre.bias": torch.zeros(32), **tensors}, tmp_path / "g.safetensors")

    def found(config: HiFiCodecConfig) -> Any:
        raise LookupError(config)

    # What comes after the choice of the config is for other tests: here are no other tensors.
    monkeypatch.setattr(importer, "_renamings", found)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            load_hificodec(tmp_path / "g.safetensors", sample_rate_hz=sample_rate_hz)
    else:
        with pytest.raises(LookupError) as caught:
            load_hificodec(tmp_path / "g.safetensors", sample_rate_hz=sample_rate_hz)
        assert caught.value.args == (expected,)


def test_folders_hold_settings_and_one_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_settings()))
    save_file(_flat(_tiny_reference().state_dicts()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="the config asks for"):  # the settings are those of the published model
        load_hificodec(tmp_path)
    (tmp_path / "readme").write_text("a second file")
    with pytest.raises(ValueError, match=r"one checkpoint, found \['model.safetensors', 'readme'\]"):
        load_hificodec(tmp_path)


def test_config_files(tmp_path: Path) -> None:
    published = {
        HIFICODEC_16K_320D: (16000, [8, 5, 4, 2], [16, 11, 8, 4]),
        HIFICODEC_24K_320D: (24000, [8, 5, 4, 2], [16, 11, 8, 4]),
        HIFICODEC_24K_240D: (24000, [8, 5, 3, 2], [16, 11, 7, 4]),
    }
    for expected, (rate_hz, ratios, kernel_sizes) in published.items():
        changes = {"sampling_rate": rate_hz, "upsample_rates": ratios, "upsample_kernel_sizes": kernel_sizes}
        (tmp_path / "config.json").write_text(json.dumps(_settings(**changes)))
        assert read_config(tmp_path / "config.json") == expected


def _settings(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "resblock": "1",
        "batch_size": 64,
        "learning_rate": 0.0002,
        "upsample_rates": [8, 5, 4, 2],
        "upsample_kernel_sizes": [16, 11, 8, 4],
        "upsample_initial_channel": 512,
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
        "segment_size": 16000,
        "num_mels": 80,
        "n_code_groups": 2,
        "n_codes": 1024,
        "sampling_rate": 16000,
    }
    return values | changes


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in _settings().items() if name != key}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "encodec"}, "does not describe a HiFi-Codec model"),
        (["upsample_rates"], r"config\.json is not a mapping"),
        (_without("n_codes"), r"config\.json: n_codes is missing"),
        (_settings(resblock="2"), "resblock='2' is not supported, '1' is"),
        (_settings(resblock_dilation_sizes=[[1, 3, 5], [1, 3], [1, 3, 5]]), "must be one list, the same for each"),
        (_settings(resblock_dilation_sizes=[[1, 3, 5]]), "must be one list, the same for each"),
        (_settings(resblock_dilation_sizes=5), r"config\.json: "),
        (_settings(n_codes="many"), r"config\.json\.quantizer\.codebook_size: expected int, got 'many'"),
        (_settings(n_code_groups=3), "latent_dim=512 is not a multiple of num_groups=3"),
        (_settings(upsample_kernel_sizes=[16, 11, 8]), "3 kernel_sizes do not fit 4 ratios"),
    ],
)
def test_config_files_that_do_not_fit_are_value_errors(tmp_path: Path, settings: Any, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "config.json")


def test_pickles_are_read_on_request_only_and_run_no_code(tmp_path: Path) -> None:
    torch.save(_tiny_reference().state_dicts(), tmp_path / "g_00005000")
    with pytest.raises(ValueError, match=r"if you trust it, allow_pickle=True \(--allow-pickle\) reads it"):
        load_hificodec(tmp_path / "g_00005000", config=TINY)
    load_hificodec(tmp_path / "g_00005000", config=TINY, allow_pickle=True)

    class Harmful:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
            return Path.write_text, (tmp_path / "harm", "done")  # type: ignore[return-value]

    torch.save({"generator": {}, "encoder": {"conv_post.bias": Harmful()}, "quantizer": {}}, tmp_path / "bad")
    with pytest.raises(ValueError, match="bad cannot be read"):
        load_hificodec(tmp_path / "bad", config=TINY, allow_pickle=True)
    assert not (tmp_path / "harm").exists()


def test_a_saved_import_loads(tmp_path: Path) -> None:
    save_file(_flat(_tiny_reference().state_dicts()), tmp_path / "g.safetensors")
    codec = load_hificodec(tmp_path / "g.safetensors", config=TINY)
    save(codec, tmp_path / "ours", name="tiny@1", dtype="float32")
    audio = _audio(1, 1000)
    loaded = load(tmp_path / "ours")
    assert torch.equal(loaded.encode(audio).codes, codec.encode(audio).codes)
    assert loaded.config.quantizer.learning == "gradient"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.conv_pre.bias"), r"missing \['encoder.layers.0.bias'\], unknown \[\]"),
        (lambda t: t.pop("encoder.normalize.4.weight"), r"missing \['encoder.layers.6.norms.1.weight'\]"),
        (lambda t: t.pop("generator.ups.1.weight_g"), "missing the length of generator.layers.5.weight"),
        (
            lambda t: t.pop("generator.resblocks.8.convs2.1.weight_v"),
            "missing the direction of generator.layers.9.blocks.2.layers.1.branch.layers.3.weight",
        ),
        (
            lambda t: t.pop("quantizer.quantizer_modules2.1.embedding.weight"),
            r"missing \['quantizer.quantizer_modules2.1.embedding.weight'\]",
        ),
        (lambda t: t.update({"encoder.ups.9.bias": torch.zeros(4)}), r"unknown \['encoder.ups.9.bias'\]"),
        (lambda t: t.update({"mpd.bias": torch.zeros(4)}), r"unknown \['mpd.bias'\]"),
        (
            lambda t: t.update({"quantizer.quantizer_modules.2.embedding.weight": torch.zeros(16, 6)}),
            r"unknown \['quantizer.quantizer_modules.2.embedding.weight'\]",
        ),
        (
            lambda t: t.update({"quantizer.quantizer_modules.0.embedding.weight": torch.zeros(8, 6)}),
            r"codebooks are \(8, 6\), the config asks for \(16, 6\)",
        ),
        (
            lambda t: t.update({"encoder.conv_post.bias": torch.zeros(5)}),
            r"encoder.layers.11.bias is \(5,\), the config asks for \(12,\)",
        ),
        (
            lambda t: t.update({"encoder.conv_post.bias": torch.full((12,), torch.nan)}),
            "encoder.layers.11.bias holds NaN",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = _flat(_tiny_reference().state_dicts())
    change(tensors)
    save_file(tensors, tmp_path / "g.safetensors")
    with pytest.raises(ValueError, match=message):
        load_hificodec(tmp_path / "g.safetensors", config=TINY)


def test_sources_that_are_no_checkpoints_are_value_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file"):
        load_hificodec(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_hificodec(tmp_path)
    with pytest.raises(ValueError, match="config= cannot be given"):
        load_hificodec(tmp_path, config=TINY)
    (tmp_path / "config.json").write_text(json.dumps(_settings()))
    with pytest.raises(ValueError, match=r"must hold a config\.json and one checkpoint, found \[\]"):
        load_hificodec(tmp_path)
    torch.save({"generator": {}, "encoder": {}}, tmp_path / "two")
    with pytest.raises(ValueError, match=r"holds \['encoder', 'generator'\], and not generator, encoder, quantizer"):
        load_hificodec(tmp_path / "two", allow_pickle=True)
    torch.save({"generator": {"steps": 3}, "encoder": {}, "quantizer": {}}, tmp_path / "numbers")
    with pytest.raises(ValueError, match="not a mapping of names to tensors"):
        load_hificodec(tmp_path / "numbers", allow_pickle=True)
    with pytest.raises(ValueError, match="is a model for 16000 Hz, not for 24000 Hz"):
        load_hificodec(tmp_path / "two", config=TINY, sample_rate_hz=24000)
    save_file(_flat(_tiny_reference().state_dicts()), tmp_path / "g.safetensors")
    three = dataclasses.replace(TINY, quantizer=dataclasses.replace(TINY.quantizer, num_stages=3))
    with pytest.raises(ValueError, match="HiFi-Codec has a residual_vq of 2 stages"):
        load_hificodec(tmp_path / "g.safetensors", config=three)
