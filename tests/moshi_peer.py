"""The Mimi of the `moshi` package, untrained and of any shape."""

import copy
from typing import Any

import pytest

from codec.models.mimi import MimiConfig
from codec.quantizers.split import SplitVQConfig
from tools.stream_load.moshi_peer import moshi_loaders


def import_moshi() -> Any:
    """Its module `moshi.models.loaders`; the test is skipped where the package is not installed."""
    try:
        return moshi_loaders()
    except ImportError as error:
        pytest.skip(str(error))


def moshi_mimi(config: MimiConfig | None = None) -> Any:
    """Its model of the same shape as `config`, by default the published one; untrained, in evaluation mode."""
    loaders = import_moshi()
    if config is None:
        return loaders.get_mimi(None, num_codebooks=32)
    settings = copy.deepcopy(loaders._mimi_config)
    quantizer = config.quantizer
    assert isinstance(quantizer, SplitVQConfig)
    width = quantizer.latent_dim
    settings |= {"sample_rate": config.sample_rate_hz, "frame_rate": config.sample_rate_hz / config.hop_length}
    settings["seanet"] |= {
        "channels": config.num_channels,
        "dimension": width,
        "n_filters": config.num_filters,
        "n_residual_layers": config.num_residual_blocks,
        "ratios": list(config.ratios),
    }
    settings["quantizer"] |= {
        "dimension": quantizer.codebook_dim,
        "n_q": quantizer.num_stages,
        "bins": quantizer.codebook_size,
        "input_dimension": width,
        "output_dimension": width,
    }
    settings["transformer"] |= {
        "d_model": width,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "dim_feedforward": config.feedforward_dim,
        "context": config.window,
        "input_dimension": width,
        "output_dimensions": [width],
    }
    return loaders.get_mimi(None, settings, num_codebooks=quantizer.num_stages)
