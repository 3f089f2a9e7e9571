import json
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.config import build, from_dict, register, to_dict
from codec.models.multirate import MultirateCodec, MultirateConfig
from codec.quantizers.residual import ResidualVQConfig
from codec.testing import tiny_config

sizes = st.integers(1, 5000)


@st.composite
def multirate_configs(draw: st.DrawFn) -> MultirateConfig:
    strides = draw(st.lists(st.integers(1, 9), max_size=3).map(tuple))
    per_rate = st.lists(sizes, min_size=len(strides) + 1, max_size=len(strides) + 1).map(tuple)
    num_groups = draw(st.integers(1, 3))
    quantizer = ResidualVQConfig(
        latent_dim=num_groups * draw(sizes),
        num_stages=draw(sizes),
        num_groups=num_groups,
        codebook_size=draw(sizes),
        ema_decay=draw(st.floats(0.01, 0.999)),
    )
    return MultirateConfig(
        sample_rate_hz=draw(sizes),
        patch_samples=draw(sizes),
        strides=strides,
        encoder_channels=draw(per_rate),
        encoder_blocks=draw(per_rate),
        decoder_channels=draw(per_rate),
        decoder_blocks=draw(per_rate),
        quantizer=quantizer,
        decode_delay_frames=draw(st.integers(0, 3)),
    )


def tiny_dict(path: str = "", value: Any = None) -> dict[str, Any]:
    """The tiny configuration as it comes from JSON, with the value at a dotted path set."""
    data: dict[str, Any] = json.loads(json.dumps(to_dict(tiny_config())))
    if path:
        *parents, key = path.split(".")
        place = data
        for parent in parents:
            place = place[parent]
        place[key] = value
    return data


@given(config=multirate_configs())
@settings(max_examples=40)
def test_configs_survive_json(config: MultirateConfig) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_the_dict_is_plain_and_names_its_types() -> None:
    data = to_dict(tiny_config())
    assert data == tiny_dict()
    assert list(data) == ["type", *(f.name for f in fields(MultirateConfig))]
    assert (data["type"], data["quantizer"]["type"]) == ("multirate", "residual_vq")
    assert data["strides"] == [2, 8]


def test_reading_does_not_change_the_dict() -> None:
    data = tiny_dict()
    from_dict(data)
    assert data == tiny_dict()


def test_settings_that_are_left_out_take_their_defaults() -> None:
    data = tiny_dict()
    for name in ("window_patches", "kernel_size", "expansion"):
        del data[name]
    del data["quantizer"]["codebook_size"]
    config = from_dict(data)
    assert (config.window_patches, config.kernel_size, config.expansion) == (3, 7, 4)
    assert config.quantizer.codebook_size == 1024


def test_an_integer_is_a_fine_float() -> None:
    config = from_dict(tiny_dict("quantizer.dead_threshold", 0))
    assert type(config.quantizer.dead_threshold) is float


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stride", [2, 8], r"config\.stride: multirate has no such setting \(it has .*strides"),
        ("quantizer.stages", 3, r"config\.quantizer\.stages: residual_vq has no such setting"),
        ("quantizer._target_", "os.system", r"config\.quantizer\._target_: "),
        ("type", "multirat", r"config\.type: 'multirat' is unknown \(known: .*multirate, .*residual_vq"),
        ("type", None, r"config\.type: None is unknown"),
        ("type", ["multirate"], r"config\.type: \['multirate'\] is unknown"),
        ("quantizer.type", "vq", r"config\.quantizer\.type: 'vq' is unknown"),
        ("quantizer", None, r"config\.quantizer: expected a mapping, got None"),
        ("quantizer", "residual_vq", r"config\.quantizer: expected a mapping"),
        ("quantizer", {}, r"config\.quantizer\.type: None is unknown"),
        ("quantizer", tiny_dict(), r"config\.quantizer\.type: 'multirate' does not fit here .*residual_vq"),
        ("sample_rate_hz", 16000.0, r"config\.sample_rate_hz: expected int, got 16000\.0"),
        ("sample_rate_hz", "16000", r"config\.sample_rate_hz: expected int, got '16000'"),
        ("sample_rate_hz", True, r"config\.sample_rate_hz: expected int, got True"),
        ("sample_rate_hz", None, r"config\.sample_rate_hz: expected int, got None"),
        ("sample_rate_hz", [16000], r"config\.sample_rate_hz: expected int"),
        ("strides", 2, r"config\.strides: expected a list, got 2"),
        ("strides", "28", r"config\.strides: expected a list, got '28'"),
        ("strides", [2, "8"], r"config\.strides\[1\]: expected int, got '8'"),
        ("strides", [2, [8]], r"config\.strides\[1\]: expected int"),
        ("quantizer.ema_decay", "0.9", r"config\.quantizer\.ema_decay: expected float, got '0\.9'"),
        ("quantizer.ema_decay", False, r"config\.quantizer\.ema_decay: expected float, got False"),
        ("quantizer.latent_dim", 0, r"config\.quantizer: .*latent_dim"),
        ("strides", [2, 0], r"config: .*strides"),
        ("encoder_channels", [8, 12], r"config: encoder_channels must name 3 rates"),
    ],
)
def test_errors_name_the_path(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        from_dict(tiny_dict(path, value))
    assert "\n" not in str(caught.value)


def test_missing_values_are_named() -> None:
    data = tiny_dict()
    del data["strides"], data["patch_samples"]
    with pytest.raises(ValueError, match=r"^config: multirate needs patch_samples, strides$"):
        from_dict(data)
    with pytest.raises(ValueError, match=r"^config\.quantizer: residual_vq needs latent_dim, num_stages$"):
        from_dict(tiny_dict("quantizer", {"type": "residual_vq"}))


@pytest.mark.parametrize("data", [None, [], "multirate", 3])
def test_what_is_no_mapping_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=r"^config: expected a mapping"):
        from_dict(data)


def test_the_path_starts_where_the_caller_says() -> None:
    with pytest.raises(ValueError, match=r"^folder/config\.json\.quantizer\.num_stages: expected int"):
        from_dict(tiny_dict("quantizer.num_stages", "3"), "folder/config.json")


def test_build_makes_the_registered_class() -> None:
    config = tiny_config()
    codec = build(config)
    assert isinstance(codec, MultirateCodec)
    assert codec.config == config
    assert codec.hop_length == 4 * 2 * 8


def test_build_refuses_what_is_not_registered() -> None:
    @dataclass(frozen=True)
    class Stranger:
        size: int = 1

    for config in (Stranger(), 3, to_dict(tiny_config()), MultirateConfig):
        with pytest.raises(ValueError, match="is not a registered configuration"):
            build(config)
    for config in (Stranger(), replace(tiny_config(), quantizer=Stranger())):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="Stranger is not a registered configuration"):
            to_dict(config)


def test_a_type_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'multirate' is registered twice"):
        register("multirate", MultirateConfig)(MultirateCodec)
