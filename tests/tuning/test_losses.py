"""Each loss against its plain formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss

import sdgraph
from sdgraph import errors
from sdgraph.passes import MECondConv, PruneBlocks
from sdgraph.runtime.latents import as_pipelines_run_it, encoded, scaled, unscaled
from sdgraph.spec import read
from sdgraph.tuning import (
    AttentionMaps,
    Batch,
    Comparison,
    Denoising,
    Features,
    Guidance,
    ImageFeatures,
    Loss,
    NoiseSchedule,
    Output,
    Phased,
    RoutingPrior,
    Similarity,
    Trajectory,
    Wavelet,
)
from sdgraph.tuning.losses.image import high_bands
from sdgraph.tuning.train_step import Objective

from ..models import build, trace
from .conftest import equal

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def comparison(prediction: str = "epsilon", timesteps: tuple[int, ...] = (1, 500, 999)) -> Comparison:
    """Random latents and predictions."""
    noise_schedule = NoiseSchedule.of(DDPMScheduler.from_config(SCHEDULER.config, prediction_type=prediction))
    clean, noise, student, teacher = torch.randn(4, len(timesteps), 4, 8, 8)
    steps = torch.tensor(timesteps)
    return Comparison(
        Batch(clean, noise, noise_schedule.noised(clean, noise, steps), steps, {}), noise_schedule, student, teacher
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_noise_schedule_is_the_schedulers(prediction: str) -> None:
    it = comparison(prediction)
    scheduler = DDPMScheduler.from_config(SCHEDULER.config, prediction_type=prediction)
    clean, noise, steps = it.batch.clean, it.batch.noise, it.batch.timesteps
    assert noise is not None
    target = it.noise_schedule.target(clean, noise, steps)

    torch.testing.assert_close(it.batch.noisy, scheduler.add_noise(clean, noise, steps))
    if prediction == "v_prediction":
        torch.testing.assert_close(target, scheduler.get_velocity(clean, noise, steps))
    torch.testing.assert_close(it.noise_schedule.clean(it.batch.noisy, target, steps), clean, rtol=1e-3, atol=2e-3)
    for row, step in enumerate(steps):
        expected = scheduler.step(it.student[row : row + 1], int(step), it.batch.noisy[row : row + 1])
        mine = it.noise_schedule.clean(it.batch.noisy, it.student, steps)[row : row + 1]
        clipped = mine.clamp(-1, 1)  # as this scheduler does
        torch.testing.assert_close(clipped, expected.pred_original_sample, rtol=1e-3, atol=2e-3)


def test_a_preset_leaves_out_features_of_another_resolution() -> None:
    teacher = trace(build("sd15-levels"))
    pruned = sdgraph.apply(teacher, [PruneBlocks("bk-sdm-tiny")])  # its third block keeps the size
    taps = [mine.path for mine, _ in Features("stage").taps(pruned.graph, teacher.graph)]
    assert taps == ["down_blocks.0", "down_blocks.1", "up_blocks.1", "up_blocks.2", "up_blocks.3"]
    with pytest.raises(errors.TuningError, match=r"down_blocks.2 has another resolution"):
        Features(("down_blocks.2",)).taps(pruned.graph, teacher.graph)


def test_denoising_and_output_are_mean_squared_errors() -> None:
    it = comparison("v_prediction")
    assert it.batch.noise is not None
    target = it.noise_schedule.target(it.batch.clean, it.batch.noise, it.batch.timesteps)

    torch.testing.assert_close(Denoising()(it, []), mse_loss(it.student, target))
    torch.testing.assert_close(Output()(it, []), mse_loss(it.student, it.teacher))

    some = replace(it, batch=replace(it.batch, own=torch.tensor([True, False, True])))  # the second has another caption
    torch.testing.assert_close(Denoising()(some, []), mse_loss(it.student[[0, 2]], target[[0, 2]]) * 2 / 3)
    torch.testing.assert_close(Output()(some, []), mse_loss(it.student, it.teacher))


def test_guidance_compares_what_a_pipeline_computes() -> None:
    it = comparison(timesteps=(500, 500, 20, 20))

    def guided(prediction: Tensor) -> Tensor:
        captioned, empty = prediction[[0, 2]], prediction[[1, 3]]
        return empty + 3.0 * (captioned - empty)

    paired = replace(it, batch=replace(it.batch, pairs=True))
    torch.testing.assert_close(Guidance(3.0)(paired, []), mse_loss(guided(it.student), guided(it.teacher)) / 9)
    weighed = Guidance(3.0, snr_gamma=5.0)(paired, [])
    weights = it.noise_schedule.min_snr(torch.tensor([500, 20]), 5.0)
    errors_of = (guided(it.student) - guided(it.teacher)).square().mean((1, 2, 3)) / 9
    torch.testing.assert_close(weighed, (errors_of * weights).mean())
    with pytest.raises(errors.TuningError, match="guidance_pairs=True"):
        Guidance(3.0)(it, [])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_is_diffusers_formula(prediction: str) -> None:
    from diffusers.training_utils import compute_snr

    it = comparison(prediction)
    snr = compute_snr(SCHEDULER, it.batch.timesteps)
    weight = torch.stack([snr, 5.0 * torch.ones_like(snr)], 1).min(1)[0]
    weight = weight / snr if prediction == "epsilon" else weight / (snr + 1)
    expected = (weight * (it.student - it.teacher).square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(Output(snr_gamma=5.0)(it, []), expected, rtol=1e-4, atol=1e-6)


def test_features_are_squared_errors_relative_to_the_teachers() -> None:
    mine, its = torch.randn(2, 3, 8, 4, 4)
    wide = 100 * mine, 100 * its
    rows = [mse_loss(a, b) / b.square().mean() for a, b in zip(mine, its, strict=True)]
    expected = torch.stack(rows).mean()

    torch.testing.assert_close(Features(sigma=None)(comparison(), [(mine, its)]), expected)
    torch.testing.assert_close(Features(sigma=None)(comparison(), [(mine, its), wide]), expected)


def test_features_leave_outliers_out() -> None:
    mine, its = torch.randn(2, 3, 8, 4, 4).clamp(-1.5, 1.5)
    plain = Features()(comparison(), [(mine, its)])
    mine[0, 0, 0, 0] = 1e4
    torch.testing.assert_close(Features()(comparison(), [(mine, its)]), plain, rtol=0.02, atol=0)
    assert Features(sigma=None)(comparison(), [(mine, its)]) > 1000 * plain


def test_attention_maps_are_compared_as_distributions() -> None:
    query, key, other_query, other_key = (torch.randn(2, 3, count, 8) for count in (16, 5, 16, 5))
    mine, its = (
        torch.softmax(q @ k.transpose(2, 3) / 8**0.5, 3).mean(1) for q, k in ((query, key), (other_query, other_key))
    )
    expected = kl_div(mine.log(), its, reduction="none").sum(-1).mean()
    loss = AttentionMaps()

    torch.testing.assert_close(loss(comparison(), [(query, other_query), (key, other_key)]), expected)
    assert loss(comparison(), [(query, query), (key, key)]) == 0


def test_similarity_is_that_of_its_paper() -> None:
    mine, its = torch.randn(6, 4, 2, 2), torch.randn(6, 10, 3, 3)  # other widths and sizes
    products = [f.flatten(1) @ f.flatten(1).T for f in (mine, its)]
    rows = [p / p.norm(dim=1, keepdim=True) for p in products]
    whole = Similarity(group=6)(comparison(), [(mine, its)])
    torch.testing.assert_close(whole, (rows[0] - rows[1]).square().sum() / 36)
    parts = [Similarity(group=3)(comparison(), [(mine[at], its[at])]) for at in (slice(3), slice(3, 6))]
    torch.testing.assert_close(Similarity(group=3)(comparison(), [(mine, its)]), torch.stack(parts).mean())
    with pytest.raises(errors.TuningError, match="6 samples of a forward pass are no whole groups of 4"):
        Similarity(group=4)(comparison(), [(mine, its)])
    with pytest.raises(errors.SpecError, match="group"):
        Similarity(group=1)


def test_haar_bands_keep_the_energy_and_see_no_constant() -> None:
    image = torch.randn(2, 4, 8, 8)
    bands = high_bands(image, 3)
    low = image.mean((2, 3))
    assert [tuple(band.shape) for band in bands] == [(2, 12, 4, 4), (2, 12, 2, 2), (2, 12, 1, 1)]
    energy = sum((band.square().sum() for band in bands), 64 * low.square().sum())
    torch.testing.assert_close(energy, image.square().sum())
    assert all(band.abs().max() == 0 for band in high_bands(torch.ones(1, 1, 8, 8), 3))


def test_wavelets_count_only_little_noise() -> None:
    it = comparison()
    few = comparison(timesteps=(900, 999, 950))
    mine, its = (
        torch.cat(
            [band.flatten(1) for band in high_bands(it.noise_schedule.clean(it.batch.noisy, p, it.batch.timesteps), 2)],
            1,
        )
        for p in (it.student, it.teacher)
    )
    torch.testing.assert_close(Wavelet()(it, []), (mine - its)[0].abs().sum() / its[0].abs().sum() / 3)
    assert Wavelet()(few, []) == 0


def test_the_encoder_sees_decoded_images_and_stays_as_it_is(pipe: object) -> None:
    it = comparison()
    it = Comparison(it.batch, it.noise_schedule, it.student.clone().requires_grad_(), it.teacher)
    vae = pipe.vae  # type: ignore[attr-defined]
    encoder = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.LazyLinear(6))
    seen = []
    for prediction in (it.student, it.teacher):
        clean = it.noise_schedule.clean(it.batch.noisy, prediction, it.batch.timesteps)
        seen.append(encoder(vae.decode(clean / vae.config.scaling_factor).sample))
    errors = (seen[0] - seen[1]).square().mean(1) / seen[1].square().mean(1)
    expected = (errors * it.noise_schedule.alphas[it.batch.timesteps]).mean()

    term = ImageFeatures(encoder, vae)(it, [])
    term.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(term, expected)
    assert it.student.grad is not None
    assert it.student.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in (*encoder.parameters(), *vae.parameters()))


class Half(nn.Module):
    """An encoder with random layers and statistics of its batches, which evaluation mode turns off."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.layers(images)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_images_are_decoded_as_they_are_encoded(pipe: object, dtype: torch.dtype) -> None:
    vae = copy.deepcopy(pipe.vae).to(dtype)  # type: ignore[attr-defined]
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 4.0], "force_upcast": True}
    vae.register_to_config(**statistics)
    it, encoder = comparison(), Half().to(dtype)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    loss = ImageFeatures(encoder, vae)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = scaled(vae.config, encoded(as_pipelines_run_it(vae), images)[:, 0].float())
    torch.testing.assert_close(scaled(vae.config, unscaled(vae.config, latents)), latents)
    plain = copy.deepcopy(pipe.vae)  # type: ignore[attr-defined]
    expected = Half()
    expected.load_state_dict({name: value.float() for name, value in before.items()})
    decoded = plain.decode(encoded(plain, images)[:, 0]).sample
    torch.testing.assert_close(loss._seen(latents), expected.eval()(decoded).flatten(1), rtol=0.05, atol=0.05)

    it = replace(it, student=it.student.clone().requires_grad_())
    loss(it, []).backward()  # type: ignore[no-untyped-call]
    assert it.student.grad is not None
    assert torch.isfinite(it.student.grad).all()
    assert it.student.grad.abs().sum() > 0
    assert equal(encoder.state_dict(), before)
    assert encoder.training
    assert vae.dtype == dtype


SPLIT: dict[type[Loss], Callable[[nn.Module], Loss]] = {
    AttentionMaps: lambda _: AttentionMaps(),
    Denoising: lambda _: Denoising(snr_gamma=5.0),
    Features: lambda _: Features(),
    Guidance: lambda _: Guidance(snr_gamma=5.0),
    ImageFeatures: lambda vae: ImageFeatures(Half(), vae),
    Output: lambda _: Output(snr_gamma=5.0),
    Phased: lambda _: Phased(),
    RoutingPrior: lambda _: RoutingPrior(),
    Similarity: lambda _: Similarity(group=2),
    Trajectory: lambda _: Trajectory(),
    Wavelet: lambda _: Wavelet(),
}


def test_all_losses_are_split() -> None:
    named = [getattr(sdgraph.tuning, name) for name in sdgraph.tuning.__all__]
    assert {one for one in named if isinstance(one, type) and issubclass(one, Loss)} - {Loss} == SPLIT.keys()


def on_paths(it: Comparison) -> Comparison:
    """The same rows as points of paths, of which the last two are the last ones of their phases."""
    target, following, prediction = torch.randn(3, *it.batch.clean.shape)
    following[-2:] = target[-2:]
    lower = (it.batch.timesteps - 10).clamp(min=0)
    path = {"target": target, "target_alphas": torch.rand(len(target)).clamp(min=0.1), "following": following}
    return replace(it, batch=replace(it.batch, own=None, following_timesteps=lower, **path), following=prediction)


@pytest.mark.parametrize("kind", SPLIT, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_gradient_of_a_batch_is_the_mean_of_its_parts(kind: type[Loss], seed: int, pipe: object) -> None:
    """Whatever rows a part has: at other timesteps, of other size, with captions of other rows."""
    torch.manual_seed(seed)
    loss, rows = SPLIT[kind](pipe.vae), 8  # type: ignore[attr-defined]
    steps = torch.randint(1000, (rows // 2,)).repeat_interleave(2)
    steps[-2:] = 20
    it = comparison("v_prediction", tuple(steps.tolist()))
    own = torch.tensor([True, False, True, True, False, False, True, True])
    it = replace(it, batch=replace(it.batch, pairs=True, own=own))
    if kind in (Phased, Trajectory):
        it = on_paths(it)
    scale = torch.logspace(-2, 2, rows)
    shapes = {AttentionMaps: [(3, 16, 8), (3, 5, 8)], RoutingPrior: [(4,)]}.get(kind, [(8, 4, 4), (6, 4)])
    leaves = [it.student, *(torch.randn(rows, *shape) * scale.view(-1, *[1] * len(shape)) for shape in shapes)]
    others = [torch.randn_like(leaf) * scale.view(-1, *[1] * (leaf.ndim - 1)) for leaf in leaves[1:]]

    def gradients(size: int) -> list[Tensor]:
        live = [leaf.clone().requires_grad_() for leaf in leaves]
        for begin in range(0, rows, size):
            at = slice(begin, begin + size)
            rows_of = {name: value[at] for name, value in vars(it.batch).items() if isinstance(value, Tensor)}
            following = None if it.following is None else it.following[at]
            part = replace(
                it,
                batch=replace(it.batch, **rows_of),
                student=live[0][at],
                teacher=it.teacher[at],
                following=following,
            )
            pairs = [(mine[at], its[at]) for mine, its in zip(live[1:], others, strict=True)]
            (loss(part, pairs) * size / rows).backward()  # type: ignore[no-untyped-call]
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in live]

    whole = gradients(rows)
    assert any(gradient.abs().sum() > 0 for gradient in whole)
    for size in (2, 4) if kind in (Guidance, Similarity) else (1, 2, 4):
        for found, expected in zip(gradients(size), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "loss",
    [
        Output(),
        Denoising(snr_gamma=5.0, weight=0.01),
        Features("layer", weight=2.0),
        Features(("mid_block", ("up_blocks.0", "up_blocks.1"))),
        AttentionMaps(weight=0.1),
        Similarity(group=4),
        Wavelet(3),
        RoutingPrior(weight=0.01, until=0.5),
    ],
)
def test_losses_are_text(loss: Loss) -> None:
    assert read(str(loss), Loss) == loss


def test_losses_add_up_by_weight_and_are_named_apart(student: sdgraph.GraphUNet, teaching: sdgraph.GraphUNet) -> None:
    objective = Objective(
        [Output(weight=3.0), Features(("mid_block",)), Features(("up_blocks.0",), weight=0.5)], student, teaching
    )
    it = comparison()
    mine, its = torch.randn(2, 3, 8, 2, 2)
    total, terms = objective(it.batch, it.noise_schedule, [it.student, mine, 2 * mine], [it.teacher, its, its])

    assert objective.names == ("Output", "Features 1", "Features 2")
    torch.testing.assert_close(total, 3 * terms[0] + terms[1] + 0.5 * terms[2])
    torch.testing.assert_close(terms[2], Features()(it, [(2 * mine, its)]))


def test_a_weight_falls_to_zero(student: sdgraph.GraphUNet, teaching: sdgraph.GraphUNet) -> None:
    objective, it = Objective([Output(weight=3.0, until=0.5)], student, teaching), comparison()
    totals = [
        objective(it.batch, it.noise_schedule, [it.student], [it.teacher], share)[0] for share in (0, 0.25, 0.5, 1)
    ]
    torch.testing.assert_close(torch.stack(totals) / totals[0], torch.tensor([1, 0.5, 0, 0]))


@pytest.mark.parametrize("rank", [0, 2])
def test_the_prior_leads_experts_to_parts_of_the_schedule(
    student: sdgraph.GraphUNet, teaching: sdgraph.GraphUNet, rank: int
) -> None:
    experts = sdgraph.apply(student, MECondConv("**.resnets.0.conv1", 2, donors="copies", rank=rank))
    objective = Objective([Output(), RoutingPrior()], experts, teaching)
    assert objective.teacher_taps == ()
    it = comparison(timesteps=(0, 499, 500, 999))
    logits = torch.randn(4, 2)
    _, terms = objective(it.batch, it.noise_schedule, [it.student, *[logits] * len(objective.pairs)], [it.teacher])
    expected = -logits.log_softmax(1)[torch.arange(4), [0, 0, 1, 1]].mean()
    torch.testing.assert_close(terms[1], expected)
    with pytest.raises(errors.PathError, match=r"no experts(.|\n)*apply MECondConv"):
        Objective([RoutingPrior()], student, teaching)


def test_a_loss_of_ones_own(student: sdgraph.GraphUNet, teaching: sdgraph.GraphUNet) -> None:
    @dataclass(frozen=True)
    class Largest(Loss):
        """The largest error."""

        def __call__(self, comparison: Comparison, values: object) -> Tensor:
            return (comparison.student - comparison.teacher).abs().max()

    it = comparison()
    total, _ = Objective([Largest(weight=2.0)], student, teaching)(
        it.batch, it.noise_schedule, [it.student], [it.teacher]
    )
    assert total == 2 * (it.student - it.teacher).abs().max()


def test_presets_leave_out_what_one_model_lacks(student: sdgraph.GraphUNet, teaching: sdgraph.GraphUNet) -> None:
    paths = {at: [tap.path for tap, _ in Features(at).taps(student.graph, teaching.graph)] for at in ("stage", "layer")}
    assert paths["stage"] == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert "down_blocks.0.resnets.0" in paths["layer"]
    assert "down_blocks.0.resnets.1" not in paths["layer"]


def test_unknown_presets_paths_and_weights_are_refused(student: sdgraph.GraphUNet, teaching: sdgraph.GraphUNet) -> None:
    with pytest.raises(errors.SpecError, match="did you mean 'stage'"):
        Features("stages")
    with pytest.raises(errors.SpecError, match="weight"):
        Output(weight=0.0)
    with pytest.raises(errors.SpecError, match="until is 2"):
        Output(until=2)
    with pytest.raises(errors.PathError, match="removed by PruneBlocks"):
        Objective([Features(("down_blocks.0.resnets.1",))], student, teaching)
    with pytest.raises(errors.PathError, match="did you mean"):
        Objective([Features(("mid_blok",))], student, teaching)
    with pytest.raises(errors.TuningError, match="calls of scaled_dot_product_attention"):
        Objective([AttentionMaps(("mid_block.resnets.0",))], student, teaching)
