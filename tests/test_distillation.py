"""Stages learn from teachers: what they say, whom the gradient reaches, and when it counts."""

from typing import Any

import pytest
import torch
from stub_teachers import FRAMES, TEXT, StubFrames, StubFramesConfig, StubText, StubTextConfig
from torch import Tensor

from codec.config import build, from_dict, from_values
from codec.quantizers.interface import Quantizer
from recipes.crops import Place
from recipes.data import Batch
from recipes.distillation import Distillation, FrameTeacher, Objective, PieceTeacher, Students
from recipes.recordings import Recording
from recipes.settings import ObjectiveSettings
from recipes.targets import Targets

LATENT_DIM, RATE_HZ, HOP = 6, 16000, 64

# Students

QUANTIZERS: dict[str, dict[str, Any]] = {
    "rvq": {"type": "residual_vq", "num_stages": 3, "codebook_size": 8},
    "grvq": {"type": "residual_vq", "num_stages": 2, "num_groups": 2, "codebook_size": 8},
    "rvq_by_gradient": {"type": "residual_vq", "num_stages": 2, "codebook_size": 8, "learning": "gradient"},
    "simvq": {"type": "simvq", "num_stages": 2, "codebook_size": 8},
    "factorized": {"type": "factorized_vq", "num_stages": 2, "codebook_size": 8, "codebook_dim": 3},
    "fsq": {"type": "fsq", "levels": [5, 5], "num_stages": 2},
    "binary": {"type": "lookup_free", "num_bits": 6},
}


def _quantizer(name: str) -> Quantizer:
    torch.manual_seed(0)
    quantizer: Quantizer = build(from_dict({"latent_dim": LATENT_DIM} | QUANTIZERS[name]))
    return quantizer


def _latents(num_items: int = 3, num_frames: int = 10) -> Tensor:
    return torch.randn(num_items, LATENT_DIM, num_frames, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_stage_says_what_it_adds(name: str) -> None:
    """All stages together are the quantized latents; each is the difference of two prefixes, in this format."""
    quantizer, latents = _quantizer(name), _latents()
    quantized = quantizer(latents)
    students = Students(quantizer, latents, quantized)
    stages = []
    for number, num_rows in enumerate(quantizer.valid_num_quantizers):
        frames, is_there = students.stage(number)
        assert frames.shape == (3, 10, LATENT_DIM)
        assert is_there.all()
        stages.append(frames)
        prefix = quantizer.decode(quantized.codes[:, :num_rows]).transpose(1, 2)
        # latents + (entry - latents) is an entry but for rounding.
        torch.testing.assert_close(torch.stack(stages).sum(0), prefix, rtol=1e-5, atol=1e-5)
    together, is_there = students.stage(None)
    torch.testing.assert_close(together, torch.stack(stages).sum(0), rtol=1e-5, atol=1e-5)
    assert is_there.all()


@pytest.mark.parametrize("name", ["rvq", "grvq"])
def test_a_stage_of_a_residual_quantizer_is_its_entries(name: str) -> None:
    quantizer, latents = _quantizer(name), _latents()
    quantized = quantizer(latents)
    num_groups = 2 if name == "grvq" else 1
    for stage in range(len(quantizer.valid_num_quantizers)):
        rows = range(stage * num_groups, (stage + 1) * num_groups)
        entries = [quantizer.codebooks[row][quantized.codes[:, row]] for row in rows]  # type: ignore[index]
        frames, _ = Students(quantizer, latents, quantized).stage(stage)
        torch.testing.assert_close(frames, torch.cat(entries, dim=2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_stage_teaches_the_encoder_alike(name: str) -> None:
    """The gradient at the latents is that at the frames, for the last stage as for the first."""
    quantizer, latents = _quantizer(name), _latents().requires_grad_()
    wanted = torch.randn(3, 10, LATENT_DIM)
    for stage in range(len(quantizer.valid_num_quantizers)):
        frames, _ = Students(quantizer, latents, quantizer(latents)).stage(stage)
        (gradient,) = torch.autograd.grad((frames * wanted).sum(), latents)
        assert torch.equal(gradient, wanted.transpose(1, 2)), stage
    quantized = quantizer(latents)
    frames, _ = Students(quantizer, latents, quantized).stage(None)
    (gradient,) = torch.autograd.grad((frames * wanted).sum(), latents, retain_graph=True)
    # Of the sum it is the quantizer's own way back: the same where there are no projections to pass.
    (own,) = torch.autograd.grad((quantized.latents * wanted.transpose(1, 2)).sum(), latents)
    assert torch.equal(gradient, own)
    assert (gradient != 0).any(1).all()
    if name in ("rvq", "grvq", "rvq_by_gradient", "simvq"):
        assert torch.equal(gradient, wanted.transpose(1, 2))


def test_stages_that_are_absent_are_told() -> None:
    quantizer, latents = _quantizer("grvq"), _latents()
    students = Students(quantizer, latents, quantizer(latents, num_quantizers=torch.tensor([4, 2, 4])))
    for stage, expected in ((0, [True, True, True]), (1, [True, False, True]), (None, [True, True, True])):
        assert students.stage(stage)[1].tolist() == [[there] * 10 for there in expected]


def test_latents_stand_in_for_a_quantizer_that_is_not_in_use() -> None:
    latents = _latents().bfloat16()
    students = Students(_quantizer("rvq"), latents, None)
    for stage in (0, 2, None):
        frames, is_there = students.stage(stage)
        assert frames.dtype == torch.float32
        assert torch.equal(frames, latents.float().transpose(1, 2))
        assert is_there.all()


# Objectives


def _batch(num_samples: int = 640, items: tuple[int, ...] = (0, 1, 2)) -> Batch:
    audio = torch.randn(len(items), 1, num_samples, generator=torch.Generator().manual_seed(3))
    recording = Recording("a.wav", sample_rate_hz=RATE_HZ, num_samples=10 * RATE_HZ)
    places = tuple(Place("here", recording, 1000 * item) for item in items)
    return Batch(0.1 * audio, torch.tensor(items), places)


def _settings(**values: Any) -> ObjectiveSettings:
    settings: ObjectiveSettings = from_values(ObjectiveSettings, {"weight": 1.0} | values)
    return settings


def _objective(name: str = "rvq", **values: Any) -> Objective:
    return Objective("speech", _settings(**values), _quantizer(name), LATENT_DIM)


def _distillation(name: str = "rvq", **objectives: dict[str, Any]) -> Distillation:
    settings = {key: _settings(**values) for key, values in objectives.items()}
    return Distillation(settings, _quantizer(name), LATENT_DIM, frame_rate_hz=RATE_HZ / HOP)


def test_stubs_are_what_teachers_are() -> None:
    assert isinstance(StubFrames(StubFramesConfig()), FrameTeacher)
    assert isinstance(StubText(StubTextConfig()), PieceTeacher)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": {"type": "index"}}, ".teacher.type: 'index' does not fit here"),
        ({"teacher": {"type": "stub_fames"}}, ".teacher.type: 'stub_fames' is unknown"),
        ({"teacher": "FOLDER"}, ".teacher: expected a mapping"),
        ({"teacher": {"type": "stub_frames", "layer": 9}}, ".teacher.layer: stub_frames has no such setting"),
        ({"teacher": {"type": "stub_frames", "first_frames": -1}}, ".teacher: first_frames must not be negative"),
        ({"teacher": {"type": "stub_text"}}, ".alignment is needed: its teacher speaks of words, not of frames"),
        (FRAMES | {"alignment": {"type": "index"}}, ".alignment: its teacher speaks of frames already"),
        (TEXT | {"alignment": {"type": "cosine_over_time"}}, ".alignment.type: 'cosine_over_time' does not fit here"),
        (TEXT | {"alignment": {"type": "attention", "dim": 0}}, ".alignment: dim and pace_width must be positive"),
        (FRAMES | {"loss": {"type": "index"}}, ".loss.type: 'index' does not fit here"),
        (FRAMES | {"loss": {"type": "l2"}}, ".loss.type: 'l2' is unknown"),
        (FRAMES | {"stages": [0, 3]}, ".stages=[0, 3]: this quantizer has stages 0 to 2"),
        (FRAMES | {"stages": [-1]}, ".stages=[-1]: this quantizer has stages 0 to 2"),
    ],
)
def test_objectives_that_cannot_be_are_named_with_their_path(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as told:
        _objective(**values)
    assert str(told.value).startswith(f"distillation.speech{message}")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": -1.0}, "weight must not be negative, got -1.0"),
        ({"stages": []}, "stages must be different numbers, or null for their sum, got []"),
        ({"stages": [1, 1]}, "stages must be different numbers, or null for their sum, got [1, 1]"),
        ({"start_step": -1}, "start_step and ramp_steps must not be negative"),
        ({"ramp_steps": -1}, "start_step and ramp_steps must not be negative"),
        ({"start_step": 5, "stop_step": 5}, "stop_step=5 is not after start_step=5"),
        ({"wieght": 1.0}, "wieght: the configuration has no such setting"),
    ],
)
def test_impossible_settings_are_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as told:
        _settings(**FRAMES | values)
    assert str(told.value).startswith(message)


@pytest.mark.parametrize("name", ["", "a.b", "items", "train"])
def test_names_that_cannot_be_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be the name of an objective$"):
        _distillation(**{name: FRAMES})


def test_stages_of_groups_are_counted_and_not_their_rows() -> None:
    with pytest.raises(ValueError, match=r"stages=\[2\]: this quantizer has stages 0 to 1$"):
        _objective("grvq", **FRAMES, stages=[2])


def test_the_teacher_is_neither_trained_nor_saved() -> None:
    teacher = {"type": "stub_frames", "num_mixed_layers": 2}
    objective = _objective(teacher=teacher, stages=[0, 2])
    expected = {f"heads.{head}.{part}" for head in (0, 1) for part in ("weight", "bias")} | {"layer_logits"}
    assert set(objective.state_dict()) == {name for name, _ in objective.named_parameters()} == expected
    assert isinstance(objective.teacher, StubFrames)


def _forward(objective: Objective, students: Students, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    found: tuple[Tensor, dict[str, Tensor]] = objective(
        batch, students, sample_rate_hz=RATE_HZ, frame_rate_hz=RATE_HZ / HOP
    )
    return found


def test_the_loss_is_the_mean_over_stages_and_the_cosine_is_told() -> None:
    quantizer, latents, batch = _quantizer("rvq"), _latents(), _batch()
    students = Students(quantizer, latents, quantizer(latents))
    both = _objective(**FRAMES, stages=[0, 2], loss={"type": "cosine_per_frame"})
    loss, told = _forward(both, students, batch)
    losses = []
    for head, stage in zip(both.heads, (0, 2), strict=True):
        alone = _objective(**FRAMES, stages=[stage], loss={"type": "cosine_per_frame"})
        alone.heads[0].load_state_dict(head.state_dict())
        losses.append(_forward(alone, students, batch)[0])
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert told["cosine"].item() == pytest.approx(1.0 - loss.item(), abs=1e-6)
    assert told["share"].item() == 1.0


def test_only_frames_with_a_target_and_a_stage_count() -> None:
    """Item 1 lacks the stage, and of the others the first four frames of ten have a target."""
    quantizer, latents, batch = _quantizer("rvq"), _latents().requires_grad_(), _batch()
    quantized = quantizer(latents, num_quantizers=torch.tensor([3, 1, 3]))
    objective = _objective(teacher={"type": "stub_frames", "first_frames": 4}, stages=[1])
    loss, told = _forward(objective, Students(quantizer, latents, quantized), batch)
    (gradient,) = torch.autograd.grad(loss, latents)
    counts = (gradient != 0).any(1)
    assert counts.tolist() == [[item != 1 and frame < 4 for frame in range(10)] for item in range(3)]
    assert told["share"].item() == pytest.approx(0.4)


def test_layers_are_mixed_by_weights_that_learn() -> None:
    """Of two layers, one is what the frames say: its weight grows."""
    batch = _batch()
    objective = _objective(
        teacher={"type": "stub_frames", "num_mixed_layers": 2}, stages=None, loss={"type": "cosine_per_frame"}
    )
    targets = objective.teacher.targets(batch, sample_rate_hz=RATE_HZ, num_frames=10, frame_rate_hz=RATE_HZ / HOP)
    # At first all layers weigh alike.
    students = Students(_quantizer("rvq"), _latents(), None)
    loss, _ = _forward(objective, students, batch)
    expected = objective.loss(objective.heads[0](students.latents), targets.values.mean(2), targets.mask)
    torch.testing.assert_close(loss, expected)
    objective.heads[0] = torch.nn.Identity()
    _forward(objective, Students(_quantizer("rvq"), targets.values[:, :, 0].mT, None), batch)[0].backward()
    assert objective.layer_logits is not None
    gradient = objective.layer_logits.grad
    assert gradient is not None
    assert gradient[0] < 0 < gradient[1]


def test_what_has_no_target_does_not_reach_the_weights_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = _objective(teacher={"type": "stub_frames", "num_mixed_layers": 2, "first_frames": 4})
    batch, found = _batch(), objective.teacher.targets

    def poisoned(*arguments: Any, **named: Any) -> Targets:
        targets: Targets = found(*arguments, **named)
        return Targets(torch.where(targets.mask[:, :, None, None], targets.values, torch.nan), targets.mask)

    losses, gradients = [], []
    for targets in (found, poisoned):
        monkeypatch.setattr(objective.teacher, "targets", targets)
        objective.zero_grad()
        loss, _ = _forward(objective, Students(_quantizer("rvq"), _latents(), None), batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in objective.parameters()])
    assert torch.equal(*losses)
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))  # type: ignore[arg-type]


LOSSES = ["cosine_over_time", "cosine_per_frame", "l1_and_cosine", "contrastive"]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("alignment", ["index", "forced", "attention"])
def test_a_batch_without_words_has_gradients_of_zeros(alignment: str, loss: str) -> None:
    """Of all that learns, since processes with words wait for the gradients of those without."""
    objective = _objective(
        teacher={"type": "stub_text", "silent_items": [0, 1, 2], "num_mixed_layers": 2},
        alignment={"type": alignment},
        loss={"type": loss},
        stages=[0, 1],
    )
    quantizer, latents = _quantizer("rvq"), _latents().requires_grad_()
    value, told = _forward(objective, Students(quantizer, latents, quantizer(latents)), _batch())
    value.backward()
    assert value.item() == 0.0
    assert told["share"].item() == 0.0
    assert torch.isnan(told["cosine"])
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name
    assert latents.grad is not None
    assert (latents.grad == 0).all()


# When they count


def test_weights_rise_and_end() -> None:
    distillation = _distillation(
        early=FRAMES | {"weight": 2.0, "stop_step": 3},
        late=TEXT | {"weight": 4.0, "start_step": 2, "ramp_steps": 4},
        never=FRAMES | {"weight": 0.0},
    )
    found = [distillation.weights_in(step) for step in range(8)]
    assert [weights["distilled_early"] for weights in found] == [2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert [weights["distilled_late"] for weights in found] == [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 4.0, 4.0]
    assert {weights["distilled_never"] for weights in found} == {0.0}


def test_teachers_are_asked_only_when_they_count() -> None:
    distillation = _distillation(
        speech=FRAMES | {"start_step": 2, "stop_step": 4}, text=TEXT, never=FRAMES | {"weight": 0.0}
    )
    students = Students(_quantizer("rvq"), _latents(), None)
    for step in range(6):
        found = distillation(_batch(), students, step=step, sample_rate_hz=RATE_HZ)
        is_asked = step in (2, 3)
        assert set(found.losses) == {"distilled_text"} | ({"distilled_speech"} if is_asked else set())
        names = ("text", "speech") if is_asked else ("text",)
        told = {f"distillation/{name}_{what}" for name in names for what in ("cosine", "share")}
        assert set(found.logged) == told
        assert all(torch.isfinite(value) for value in (found.losses | found.logged).values())
    calls = {name: getattr(module.teacher, "num_calls", None) for name, module in distillation._named()}
    assert calls == {"speech": 2, "text": None, "never": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_compute_in_float32(dtype: torch.dtype) -> None:
    """Also within autocast, as in a run with bf16-mixed."""
    distillation = _distillation(speech=FRAMES)
    latents = _latents().to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = distillation(_batch(), Students(_quantizer("rvq"), latents, None), step=0, sample_rate_hz=RATE_HZ)
    plain = distillation(_batch(), Students(_quantizer("rvq"), latents, None), step=0, sample_rate_hz=RATE_HZ)
    assert found.losses["distilled_speech"].dtype == torch.float32
    assert torch.equal(found.losses["distilled_speech"], plain.losses["distilled_speech"])
