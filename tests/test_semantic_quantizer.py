import copy

import pytest
import torch
from torch import Tensor

from codec.config import build, from_dict, to_dict
from codec.quantizers.factorized import FactorizedVQConfig
from codec.quantizers.interface import stage_gradient_norms
from codec.quantizers.residual import ResidualVQConfig
from codec.quantizers.scalar import FSQConfig
from codec.quantizers.semantic import SemanticAcousticConfig, SemanticAcousticQuantizer

BATCH, SEMANTIC, ACOUSTIC, STAGES = 3, 4, 6, 3


def _config(**changes: object) -> SemanticAcousticConfig:
    values: dict[str, object] = {
        "latent_dim": SEMANTIC + ACOUSTIC,
        "semantic": ResidualVQConfig(latent_dim=SEMANTIC, num_stages=1, codebook_size=24),
        "acoustic": ResidualVQConfig(latent_dim=ACOUSTIC, num_stages=STAGES, codebook_size=16),
    }
    return SemanticAcousticConfig(**values | changes)  # type: ignore[arg-type]


def _quantizer(**changes: object) -> SemanticAcousticQuantizer:
    torch.manual_seed(0)
    quantizer: SemanticAcousticQuantizer = build(_config(**changes))
    quantizer.initialize(_latents(200, seed=9))
    return quantizer


def _latents(num_frames: int, *, seed: int = 0) -> Tensor:
    """The acoustic dims follow from the semantic ones in part."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(BATCH, SEMANTIC + ACOUSTIC, num_frames, generator=generator)
    latents[:, SEMANTIC:] = 0.3 * latents[:, SEMANTIC:] + 2.0 * latents[:, :SEMANTIC].mean(1, keepdim=True)
    return latents


def test_by_hand() -> None:
    quantizer: SemanticAcousticQuantizer = build(
        SemanticAcousticConfig(
            latent_dim=2,
            semantic=ResidualVQConfig(latent_dim=1, num_stages=1, codebook_size=2),
            acoustic=ResidualVQConfig(latent_dim=1, num_stages=2, codebook_size=2),
        )
    )
    quantizer.semantic.codebooks.copy_(torch.tensor([[[0.0], [1.0]]]))  # type: ignore[operator]
    quantizer.acoustic.codebooks.copy_(torch.tensor([[[-2.0], [2.0]], [[-0.5], [0.5]]]))  # type: ignore[operator]
    with torch.no_grad():
        quantizer.prediction.weight.fill_(10.0)
    latents = torch.tensor([[[0.9, 0.2], [11.7, 1.5]]])
    assert quantizer.encode(latents).tolist() == [[[1, 0], [1, 1], [0, 0]]]
    quantized = quantizer(latents)
    assert quantized.latents.tolist() == [[[1.0, 0.0], [11.5, 1.5]]]
    assert quantizer.decode(quantized.codes[:, :1]).tolist() == [[[1.0, 0.0], [10.0, 0.0]]]
    assert quantized.losses["prediction"].item() == pytest.approx((1.7**2 + 1.5**2) / 2)
    assert quantized.losses["semantic_commitment"].item() == pytest.approx((0.1**2 + 0.2**2) / 2)


def test_codes_are_those_of_its_parts() -> None:
    quantizer, latents = _quantizer(), _latents(20)
    codes = quantizer.encode(latents)
    assert torch.equal(codes[:, :1], quantizer.semantic.encode(latents[:, :SEMANTIC]))
    entries = quantizer.semantic.decode(codes[:, :1])
    predicted = torch.einsum("as,bsf->baf", quantizer.prediction.weight, entries)
    left = latents[:, SEMANTIC:] - predicted
    assert torch.equal(codes[:, 1:], quantizer.acoustic.encode(left))
    torch.testing.assert_close(
        quantizer.decode(codes), torch.cat([entries, predicted + quantizer.acoustic.decode(codes[:, 1:])], dim=1)
    )


def test_prefixes_and_absent_rows() -> None:
    quantizer, latents = _quantizer(), _latents(20)
    codes = quantizer.encode(latents)
    assert quantizer.valid_num_quantizers == (1, 2, 3, 4)
    for number in quantizer.valid_num_quantizers:
        assert torch.equal(quantizer.encode(latents, num_quantizers=number), codes[:, :number])
        absent = codes.clone()
        absent[:, number:] = -1
        assert torch.equal(quantizer.decode(absent), quantizer.decode(codes[:, :number]))
    assert not quantizer.decode(torch.full_like(codes, -1)).any()
    with pytest.raises(ValueError, match="num_quantizers=5 is not one of"):
        quantizer.encode(latents, num_quantizers=5)


def test_training_gives_what_decoding_gives_for_any_prefix_of_each_item() -> None:
    quantizer, latents = _quantizer(), _latents(20)
    numbers = torch.tensor([1, 2, 4])
    mask = torch.ones(BATCH, 20, dtype=torch.bool)
    mask[:, 15:] = False
    quantized = quantizer(latents, mask, num_quantizers=numbers)
    codes = quantizer.encode(latents)
    for row, number in enumerate(numbers.tolist()):
        assert torch.equal(quantized.codes[row, :number, :15], codes[row, :number, :15])
        assert (quantized.codes[row, number:] == -1).all()
        assert (quantized.codes[row, :, 15:] == -1).all()
    torch.testing.assert_close(quantized.latents, quantizer.decode(quantized.codes))


def test_gradients_go_to_the_semantic_latents_of_items_with_row_0_alone_and_else_to_the_acoustic_ones() -> None:
    quantizer = _quantizer()
    latents = _latents(5).requires_grad_()
    weights = torch.randn(BATCH, ACOUSTIC, 5)
    heard = quantizer(latents, num_quantizers=torch.tensor([1, 2, 4])).latents[:, SEMANTIC:]
    gradient, of_prediction = torch.autograd.grad(
        (heard * weights).sum(), (latents, quantizer.prediction.weight), retain_graph=True
    )
    through = torch.einsum("as,baf->bsf", quantizer.prediction.weight, weights)
    torch.testing.assert_close(gradient[0, :SEMANTIC], through[0])
    assert not gradient[0, SEMANTIC:].any()
    assert not gradient[1:, :SEMANTIC].any()
    torch.testing.assert_close(gradient[1:, SEMANTIC:], weights[1:])
    assert of_prediction.any()


def test_the_prediction_is_taught_by_its_loss_and_teaches_nobody_else() -> None:
    quantizer = _quantizer()
    latents = _latents(5).requires_grad_()
    loss = quantizer(latents).losses["prediction"]
    gradients = torch.autograd.grad(loss, (quantizer.prediction.weight, latents), allow_unused=True)
    assert gradients[0].any()
    assert gradients[1] is None


def test_every_stage_teaches_the_encoder() -> None:
    norms = stage_gradient_norms(_quantizer(), _latents(20))
    assert norms[0] == 0  # row 0 has a loss of its own
    assert (norms[1:] > 1e-6).all()


def test_initialisation_predicts_and_learning_lowers_the_error() -> None:
    torch.manual_seed(0)
    quantizer: SemanticAcousticQuantizer = build(_config())
    assert quantizer.num_frames_to_initialize == 16 * 24
    latents = _latents(400)
    quantizer.initialize(latents)
    acoustic = latents[:, SEMANTIC:]
    rough = quantizer.decode(quantizer.encode(latents, num_quantizers=1))[:, SEMANTIC:]
    assert (acoustic - rough).square().mean() < 0.5 * acoustic.square().mean()

    def error() -> float:
        return (quantizer.decode(quantizer.encode(latents)) - latents).square().mean().item()

    before, kept = error(), copy.deepcopy(quantizer.state_dict())
    for _ in range(20):
        first, second = quantizer(latents[:2]), quantizer(latents[2:], num_quantizers=1)
        quantizer.update(first, second)
    assert error() < before
    changed = {name for name, value in quantizer.state_dict().items() if not torch.equal(value, kept[name])}
    assert changed == {"semantic.codebooks", "acoustic.codebooks"}


def test_a_batch_of_row_0_alone_leaves_the_acoustic_codebooks_alone() -> None:
    quantizer = _quantizer()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.update(quantizer(_latents(30), num_quantizers=1))
    after = quantizer.state_dict()
    assert torch.equal(after["acoustic.codebooks"], before["acoustic.codebooks"])
    assert not torch.equal(after["semantic.codebooks"], before["semantic.codebooks"])


def test_training_state_is_restored() -> None:
    quantizer, other = _quantizer(), _quantizer()
    quantizer.update(quantizer(_latents(30)))
    other.load_state_dict(quantizer.state_dict())
    other.load_training_state(copy.deepcopy(quantizer.training_state()))
    for one in (quantizer, other):
        one.update(one(_latents(30, seed=3)))
    for name, value in quantizer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_stages_know_their_dims() -> None:
    quantizer = _quantizer()
    dims = [list(range(10)[quantizer.dims_of_stage(stage)]) for stage in range(4)]
    assert dims == [[0, 1, 2, 3]] + 3 * [[4, 5, 6, 7, 8, 9]]


@pytest.mark.parametrize(
    ("semantic", "acoustic"),
    [
        (FactorizedVQConfig(latent_dim=4, num_stages=1, codebook_size=24, codebook_dim=2), None),
        (FSQConfig(latent_dim=4, num_stages=1, levels=(3, 5)), FSQConfig(latent_dim=6, num_stages=2, levels=(4, 4))),
    ],
)
def test_other_quantizers_take_either_part(semantic: object, acoustic: object) -> None:
    changes = {"semantic": semantic} | ({"acoustic": acoustic} if acoustic else {})
    config = _config(**changes)
    assert from_dict(to_dict(config)) == config
    quantizer = _quantizer(**changes)
    quantized = quantizer(_latents(10))
    torch.testing.assert_close(quantizer.decode(quantized.codes), quantized.latents)
    assert torch.equal(quantizer.encode(_latents(10)), quantized.codes)


def test_impossible_configurations() -> None:
    with pytest.raises(ValueError, match="latent_dim=9 must be 10"):
        _config(latent_dim=9)
    with pytest.raises(ValueError, match="has 2 rows of codes, not 1"):
        _quantizer(semantic=ResidualVQConfig(latent_dim=4, num_stages=2, codebook_size=8))
