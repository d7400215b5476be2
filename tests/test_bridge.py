"""The reference bridge against equations written out again, closed forms, and guided-diffusion's checkpoint layout."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchcfm.models.unet.unet import EncoderUNetModel, UNetModel

from cellflux_bridge import cli
from cellflux_bridge.bridge.ddim import ClassifierFree, Conditional, classifier_gradient
from cellflux_bridge.bridge.depths import fourier_depths, low_frequency_magnitudes, uniform_depths
from cellflux_bridge.bridge.networks import Denoiser, NoisyClassifier, load_foreign
from cellflux_bridge.bridge.schedule import add_noise, alphas_bar, respaced
from cellflux_bridge.bridge.stairs import bridge_stairs, fourier_rule
from cellflux_bridge.bridge.variational import step_bound
from cellflux_bridge.config import ADMConfig, load_config
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.errors import UserError
from cellflux_bridge.reference import ReferenceBridge
from cellflux_bridge.training.bridge import (
    STAGES,
    DenoiserTask,
    NoisyClassifierTask,
    build_denoiser,
    build_noisy_classifier,
)
from cellflux_bridge.training.checkpoint import load_state
from cellflux_bridge.trajectory import load_trajectory

SIDE = 8
TINY = ADMConfig(channels=32, multipliers=(1, 1), attention=(8,), head_channels=16)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shuffled(network: nn.Module, *, seed: int = 0) -> nn.Module:
    """ADM's networks start with zeros at their ends; these do not."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


# A smooth network and a classifier of whom everything is known, in float64.
_MIX, _SHIFT = 0.1 * random(3, 3, seed=1), 0.4 * random(3, 3, seed=2)
_WEIGHTS = 0.02 * random(2, 3 * SIDE * SIDE, seed=3)


def toy_eps(x, tau, y):
    angle = torch.einsum("cd,bdhw->bchw", _MIX, x) + _SHIFT[y][:, :, None, None]
    return torch.sin(angle + tau[:, None, None, None].double() / 300)


def toy_classifier(x, tau):
    return x.flatten(1) @ _WEIGHTS.T * (1 + tau[:, None].double() / 500)


def toy_gradient(x: np.ndarray, tau: int, y: int) -> np.ndarray:
    """grad log softmax in closed form, for one image."""
    weights = _WEIGHTS.numpy() * (1 + tau / 500)
    logits = weights @ x.ravel()
    p = np.exp(logits - logits.max())
    return (weights[y] - (p / p.sum()) @ weights).reshape(x.shape)


def written_out(x0, source, target, depths, *, timesteps, scale, eps=toy_eps, gradient=toy_gradient):
    """One image's stair, straight from the method page's equations: nothing shared, every decode by itself."""
    step = 1000 // timesteps
    products = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    abar = {k: products[step * k] for k in range(timesteps)} | {-1: 1.0, timesteps: 0.0}

    def noise(z, k, y):
        tau = torch.tensor([step * k])
        return eps(torch.from_numpy(z)[None], tau, torch.tensor([y]))[0].numpy().astype(np.float64)

    z, encoded = x0.numpy().astype(np.float64), {}
    for k in range(max(depths)):
        e = noise(z.astype(x0.numpy().dtype), k, source)
        x = (z - np.sqrt(1 - abar[k]) * e) / np.sqrt(abar[k])
        z = np.sqrt(abar[k + 1]) * x + np.sqrt(1 - abar[k + 1]) * e
        encoded[k + 1] = z
    frames = [x0.numpy()]
    for depth in depths:
        u = encoded[depth]
        for k in range(depth - 1, -1, -1):
            state = u.astype(x0.numpy().dtype)
            e = noise(state, k, target) - np.sqrt(1 - abar[k]) * scale * gradient(state, step * k, target)
            x = (u - np.sqrt(1 - abar[k]) * e) / np.sqrt(abar[k])
            u = np.sqrt(abar[k - 1]) * x + np.sqrt(1 - abar[k - 1]) * e
        frames.append(u)
    return np.stack(frames)


def toy_stairs(x0, depths, *, timesteps=20, scale=2.0, source=None, target=None, classifier=toy_classifier, **options):
    num = len(x0)
    return bridge_stairs(
        x0,
        torch.zeros(num, dtype=torch.long) if source is None else source,
        torch.ones(num, dtype=torch.long) if target is None else target,
        schedule=respaced(timesteps),
        encoder=Conditional(toy_eps),
        decoder=Conditional(toy_eps),
        depths=depths,
        classifier=classifier,
        scale=scale,
        **options,
    )


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_the_schedule_is_ddpms_respaced():
    products = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for timesteps in (1000, 100, 25):
        schedule = respaced(timesteps)
        step = 1000 // timesteps
        assert schedule.tau.tolist() == list(range(0, 1000, step))
        assert (schedule.at(-1), schedule.at(timesteps)) == (1.0, 0.0)
        found = [schedule.at(k) for k in range(timesteps)]
        np.testing.assert_allclose(found, products[::step], rtol=1e-12)
    assert respaced(100).at(0) == pytest.approx(0.9999, abs=1e-12)
    with pytest.raises(UserError, match=r"bridge\.timesteps: 30 does not divide 1000"):
        respaced(30)


def test_noised_images_have_the_schedules_mean_and_spread():
    x, noise = random(3, 3, 4, 4, seed=1), random(3, 3, 4, 4, seed=2)
    tau = torch.tensor([0, 500, 999])
    products = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[tau][:, None, None, None]
    expected = np.sqrt(products) * x.numpy() + np.sqrt(1 - products) * noise.numpy()
    np.testing.assert_allclose(add_noise(x, noise, tau), expected, atol=1e-12)


# --- encode and decode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_stairs_are_the_equations_written_out(scale):
    x0 = random(3, 3, SIDE, SIDE).tanh()
    depths = torch.tensor([[1, 4, 19], [2, 3, 20], [5, 11, 12]])
    source, target = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 0])
    result = toy_stairs(x0, depths, scale=scale, source=source, target=target)
    assert result.frames.shape == (4, 3, 3, SIDE, SIDE)
    for b in range(3):
        expected = written_out(x0[b], source[b].item(), target[b].item(), depths[b].tolist(), timesteps=20, scale=scale)
        np.testing.assert_allclose(result.frames[:, b], expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(result.frames[0], x0)


def test_stairs_of_adm_networks_are_the_equations_written_out():
    denoiser = shuffled(Denoiser(TINY, image_size=16, num_classes=2, learn_sigma=True, has_null=False))
    classifier = shuffled(NoisyClassifier(TINY, image_size=16, num_classes=2), seed=1)
    x0 = random(2, 3, 16, 16, dtype=torch.float32).tanh()

    def gradient(state, tau, y):
        x = torch.from_numpy(state)[None].requires_grad_()
        classifier(x, torch.tensor([tau])).log_softmax(1)[0, y].backward()
        return x.grad[0].numpy()

    result = bridge_stairs(
        x0,
        torch.zeros(2, dtype=torch.long),
        torch.ones(2, dtype=torch.long),
        schedule=respaced(10),
        encoder=Conditional(denoiser.eps),
        decoder=Conditional(denoiser.eps),
        depths=torch.tensor([3, 9]),
        classifier=classifier,
        scale=2.0,
    )
    with torch.no_grad():
        eps = denoiser.eps
        for b in range(2):
            with torch.enable_grad():
                expected = written_out(
                    x0[b],
                    0,
                    1,
                    [3, 9],
                    timesteps=10,
                    scale=2.0,
                    eps=lambda x, tau, y: eps(x, tau, y).detach(),
                    gradient=gradient,
                )
            spread = np.abs(expected).max()
            np.testing.assert_allclose(result.frames[:, b] / spread, expected / spread, atol=1e-4)


def test_the_shallowest_decode_keeps_the_off_by_one():
    x0 = random(1, 3, SIDE, SIDE)
    schedule = respaced(20)
    zero, one = torch.tensor([0]), torch.tensor([1])
    e = toy_eps(x0, zero, zero)
    clean = (x0 - (1 - schedule.at(0)) ** 0.5 * e) / schedule.at(0) ** 0.5
    z1 = schedule.at(1) ** 0.5 * clean + (1 - schedule.at(1)) ** 0.5 * e
    # z_1 lies at level 1, and is decoded as though it lay at level 0.
    expected = (z1 - (1 - schedule.at(0)) ** 0.5 * toy_eps(z1, zero, one)) / schedule.at(0) ** 0.5
    found = toy_stairs(x0, torch.tensor([1]), scale=0.0).frames[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def gaussian_eps(means, spreads):
    """The exact eps where class c is normal with means[c] and spreads[c]."""
    abar_all = alphas_bar()

    def eps(x, tau, y):
        abar = abar_all[tau][:, None, None, None]
        mean, variance = means[y][:, None, None, None], spreads[y][:, None, None, None] ** 2
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * variance + 1 - abar)

    return Conditional(eps)


def test_normal_classes_are_carried_onto_each_other():
    """DDIM's ODE carries a normal law onto another by x -> m1 + (x - m0) s1 / s0; the error falls with the step."""
    means, spreads = torch.tensor([-0.4, 0.5], dtype=torch.float64), torch.tensor([0.3, 0.6], dtype=torch.float64)
    x0 = -0.4 + 0.3 * random(4, 3, 4, 4)
    there = 0.5 + (x0 + 0.4) * 2.0
    errors = {"there": [], "back": []}
    for timesteps in (250, 1000):
        eps = gaussian_eps(means, spreads)
        for name, target, expected in (("there", 1, there), ("back", 0, x0)):
            result = bridge_stairs(
                x0,
                torch.zeros(4, dtype=torch.long),
                torch.full((4,), target),
                schedule=respaced(timesteps),
                encoder=eps,
                decoder=eps,
                depths=torch.tensor([timesteps - 1]),
            )
            errors[name].append((result.frames[1] - expected).abs().max().item())
    for coarse, fine in errors.values():
        assert fine < 0.03
        assert fine < 0.45 * coarse


def test_results_do_not_depend_on_batch_or_chunks():
    x0 = random(5, 3, SIDE, SIDE, seed=4).tanh()
    depths = torch.stack(
        [torch.randperm(20, generator=torch.Generator().manual_seed(n))[:4].sort()[0] for n in range(5)]
    )
    depths = depths + 1
    together = toy_stairs(x0, depths)
    for batch_size in (1, 3, 7):
        torch.testing.assert_close(toy_stairs(x0, depths, batch_size=batch_size), together, rtol=1e-9, atol=1e-9)
    for b in range(5):
        alone = toy_stairs(x0[b : b + 1], depths[b])
        torch.testing.assert_close(alone.frames[:, 0], together.frames[:, b], rtol=1e-9, atol=1e-9)
        assert torch.equal(alone.depths[0], together.depths[b])
        assert alone.forwards[0] == together.forwards[b]


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_the_classifiers_gradient_is_its_finite_difference():
    classifier = shuffled(NoisyClassifier(TINY, image_size=16, num_classes=3))
    for parts in (lambda x, tau: toy_classifier(x, tau), None):
        network = parts or (lambda x, tau: classifier(x.float(), tau).double())
        side, step, tolerance = (SIDE, 1e-5, 1e-7) if parts else (16, 3e-2, 2e-3)
        x, direction = random(2, 3, side, side, seed=5), random(2, 3, side, side, seed=6)
        direction = direction / direction.flatten(1).norm(dim=1)[:, None, None, None]
        tau, y = torch.tensor([10, 700]), torch.tensor([1, 0])

        def log_p(x, network=network, tau=tau, y=y):
            return network(x, tau).log_softmax(1).gather(1, y[:, None])[:, 0]

        slope = (classifier_gradient(network, x, tau, y) * direction).sum((1, 2, 3))
        with torch.no_grad():
            expected = (log_p(x + step * direction) - log_p(x - step * direction)) / (2 * step)
        torch.testing.assert_close(slope, expected, rtol=tolerance * 10, atol=tolerance)


def test_scale_0_is_no_guidance_and_asks_no_classifier():
    x0 = random(2, 3, SIDE, SIDE)

    def never(x, tau):
        raise AssertionError

    unguided = toy_stairs(x0, torch.tensor([3, 7]), classifier=None)
    for classifier in (never, toy_classifier):
        result = toy_stairs(x0, torch.tensor([3, 7]), scale=0.0, classifier=classifier)
        assert torch.equal(result.frames, unguided.frames)
        assert result.gradients.tolist() == [0, 0]
    assert not torch.allclose(toy_stairs(x0, torch.tensor([3, 7])).frames, unguided.frames)


def test_classifier_free_guidance_is_ho_and_salimans():
    x, tau, y = random(2, 3, SIDE, SIDE), torch.tensor([30, 400]), torch.tensor([0, 1])
    guided = ClassifierFree(toy_eps, null_class=2, weight=1.8)
    null = toy_eps(x, tau, torch.tensor([2, 2]))
    torch.testing.assert_close(guided(x, tau, y), 2.8 * toy_eps(x, tau, y) - 1.8 * null)
    torch.testing.assert_close(ClassifierFree(toy_eps, null_class=2, weight=0.0)(x, tau, y), toy_eps(x, tau, y))
    assert guided.forwards == 2


# --- counts -----------------------------------------------------------------------------------------------------------


def counting():
    rows = SimpleNamespace(eps=0, classifier=0, largest=0)

    def eps(x, tau, y):
        rows.eps += len(x)
        rows.largest = max(rows.largest, len(x))
        return 0.1 * x

    def classifier(x, tau):
        rows.classifier += len(x)
        return x.flatten(1)[:, :2]

    return rows, eps, classifier


@pytest.mark.parametrize(
    ("kind", "depths", "forwards", "gradients"),
    [
        ("conditional", torch.tensor([*range(10, 100, 10), 99]), 648, 549),
        ("conditional", fourier_rule(10, mirrored=True), None, None),
        ("free", torch.tensor([*range(10, 100, 10), 99]), 2 * 648, 0),
    ],
)
def test_costs_are_counted(kind, depths, forwards, gradients):
    rows, eps, classifier = counting()
    network = Conditional(eps) if kind == "conditional" else ClassifierFree(eps, null_class=2, weight=1.0)
    side = 20 if callable(depths) else 2
    seen = []
    result = bridge_stairs(
        random(3, 3, side, side),
        torch.zeros(3, dtype=torch.long),
        torch.ones(3, dtype=torch.long),
        schedule=respaced(100),
        encoder=network,
        decoder=network,
        depths=depths,
        classifier=classifier if kind == "conditional" else None,
        scale=1.0,
        batch_size=16,
        report=seen.append,
    )
    assert result.forwards.sum() == rows.eps == sum(seen) * network.forwards
    assert result.gradients.sum() == rows.classifier
    assert rows.largest == max(seen) == 16
    if forwards is None:
        assert torch.equal(result.forwards, 100 + result.depths.sum(1))
        assert torch.equal(result.gradients, result.depths.sum(1))
    else:
        assert result.forwards.tolist() == [forwards] * 3
        assert result.gradients.tolist() == [gradients] * 3


# --- depths -----------------------------------------------------------------------------------------------------------


def released_rule(magnitudes: list[float], amount: int) -> tuple[list[int], bool]:
    """The rule as the method page tells it, step by step, with a list that is spoilt as it goes."""
    entries = list(magnitudes)[::-1]
    smallest, largest = min(entries), max(entries)
    answer, before = [], 0
    for i in range(1, amount + 1):
        goal, failures = smallest + (largest - smallest) * i / amount, 0
        while True:
            distances = [abs(entry - goal) for entry in entries]
            where = distances.index(min(distances))
            if where > before:
                before = where
                answer.append(where)
                break
            entries[where] = 0
            failures += 1
            if failures > 100:
                fixed = [n * (len(entries) // amount) for n in range(1, amount + 1)]
                fixed[-1] -= 1
                return fixed, True
    return answer, False


def magnitude_lists():
    rng = np.random.default_rng(0)
    k = np.arange(100)
    yield "falling", 5 + 40 * np.exp(-k / 30)
    yield "rising", 5 + k / 10
    yield "flat", np.full(100, 3.0)
    for n in range(40):
        yield f"noisy{n}", 5 + 40 * np.exp(-k / rng.uniform(5, 60)) + rng.normal(0, rng.uniform(0, 1.5), 100)
        yield f"valley{n}", 5 + (k - rng.uniform(10, 90)) ** 2 / 100 + rng.normal(0, 0.3, 100)


def test_fourier_depths_are_the_released_ones():
    fallbacks = set()
    for name, magnitudes in magnitude_lists():
        expected, fell_back = released_rule(magnitudes.tolist(), 10)
        found = fourier_depths(magnitudes.tolist(), 10, mirrored=True)
        assert found == expected, name
        unmirrored = fourier_depths(magnitudes.tolist(), 10, mirrored=False)
        assert unmirrored == (expected if fell_back else [100 - place for place in expected[::-1]]), name
        for depths in (found, unmirrored):
            assert depths == sorted(set(depths)), name
            assert 1 <= depths[0] <= depths[-1] <= 100, name
        fallbacks.add(fell_back)
        if fell_back:
            assert found == [10, 20, 30, 40, 50, 60, 70, 80, 90, 99]
    assert fallbacks == {True, False}


@pytest.mark.parametrize(("failures", "expected"), [(60, [200, 220]), (100, [200, 220]), (101, [125, 249])])
def test_the_search_gives_up_after_100_failures(failures, expected):
    falling = np.zeros(250)
    falling[:failures], falling[200], falling[220] = 10.0, 5.0, 9.0
    found = fourier_depths(falling[::-1].tolist(), 2, mirrored=True)
    assert found == expected == released_rule(falling[::-1].tolist(), 2)[0]


def test_unmirrored_depths_pass_equal_shares_of_the_range():
    magnitudes = 5 + 40 * np.exp(-np.arange(1, 101) / 30)
    low, high = magnitudes.min(), magnitudes.max()
    depths = fourier_depths(magnitudes, 10, mirrored=False)
    shares = [(magnitudes[depth - 1] - low) / (high - low) for depth in depths]
    np.testing.assert_allclose(shares, np.arange(10, 0, -1) / 10, atol=0.02)
    mirrored = fourier_depths(magnitudes, 10, mirrored=True)
    assert mirrored == [100 - depth for depth in depths[::-1]] != depths


def test_magnitudes_are_18_bins_of_the_middle_row():
    image = random(3, 24, 24)
    grey = (torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None] * image).sum(0).numpy()
    columns = grey.sum(0)  # vertical frequency zero
    bins = [*range(-10, -1), *range(1, 10)]
    assert len(bins) == 18
    expected = np.mean([abs((columns * np.exp(-2j * np.pi * f * np.arange(24) / 24)).sum()) for f in bins])
    assert low_frequency_magnitudes(image) == pytest.approx(expected, rel=1e-10)
    batched = low_frequency_magnitudes(torch.stack([image, 2 * image])[None])
    np.testing.assert_allclose(batched, [[expected, 2 * expected]], rtol=1e-10)
    with pytest.raises(UserError, match="20 px or more; use uniform"):
        low_frequency_magnitudes(random(3, 16, 16))


def test_every_image_has_its_own_fourier_depths():
    ramp = torch.linspace(-1, 1, 24, dtype=torch.float64).expand(3, 24, 24)
    x0 = torch.stack([2 * ramp, 0.1 * random(3, 24, 24), ramp + random(3, 24, 24, seed=7)])

    def fading(x, tau, y):
        return random(*x.shape[1:], seed=8).expand(len(x), -1, -1, -1) * (0.5 + y[:, None, None, None])

    def run(x, y, rule):
        network = Conditional(fading)
        return bridge_stairs(
            x, y, torch.zeros_like(y), schedule=respaced(100), encoder=network, decoder=network, depths=rule
        )

    y = torch.tensor([0, 1, 0])
    for mirrored in (True, False):
        together = run(x0, y, fourier_rule(10, mirrored=mirrored))
        assert len({tuple(row) for row in together.depths.tolist()}) > 1
        for b in range(3):
            alone = run(x0[b : b + 1], y[b : b + 1], fourier_rule(10, mirrored=mirrored))
            assert torch.equal(alone.depths[0], together.depths[b])
            given = run(x0[b : b + 1], y[b : b + 1], together.depths[b])
            torch.testing.assert_close(given.frames[:, 0], together.frames[:, b], rtol=1e-9, atol=1e-9)


def test_uniform_depths_span_the_levels():
    assert uniform_depths(100, 10) == [10, 20, 30, 40, 50, 60, 70, 80, 90, 99]
    assert uniform_depths(25, 10) == [3, 5, 8, 10, 13, 15, 18, 20, 23, 24]
    assert uniform_depths(1000, 2) == [500, 999]
    for timesteps in (10, 25, 50, 100):
        for num in range(1, timesteps):
            depths = uniform_depths(timesteps, num)
            assert depths == sorted(set(depths))
            assert 1 <= depths[0] <= depths[-1] == timesteps - 1
    with pytest.raises(UserError, match=r"10 levels do not fit into bridge\.timesteps=10"):
        uniform_depths(10, 10)


@pytest.mark.parametrize("depths", [[3, 3], [5, 2], [0, 4], [4, 21]])
def test_wrong_depths_are_refused(depths):
    with pytest.raises(UserError, match=r"bridge\.depths: must rise strictly from 1 to at most 20"):
        toy_stairs(random(1, 3, SIDE, SIDE), torch.tensor(depths))


# --- networks and foreign weights -------------------------------------------------------------------------------------


def guided_diffusion_unet(*, channels=32, classes=2, out=3, order=False) -> UNetModel:
    return UNetModel(
        image_size=16,
        in_channels=3,
        model_channels=channels,
        out_channels=out,
        num_res_blocks=1,
        attention_resolutions=[2],
        channel_mult=(1, 1),
        num_classes=classes,
        num_head_channels=16,
        use_scale_shift_norm=True,
        resblock_updown=True,
        use_new_attention_order=order,
    )


def denoiser(*, size=16, classes=2, learn_sigma=False, has_null=False, **changes) -> Denoiser:
    config = TINY.model_copy(update=changes)
    return Denoiser(config, image_size=size, num_classes=classes, learn_sigma=learn_sigma, has_null=has_null)


def saved(folder: Path, network: nn.Module) -> Path:
    torch.save(network.state_dict(), folder / "model000100.pt")
    return folder / "model000100.pt"


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_guided_diffusion_denoisers_load(tmp_path, learn_sigma):
    theirs = shuffled(guided_diffusion_unet(out=6 if learn_sigma else 3))
    ours = denoiser(learn_sigma=learn_sigma).eval()
    load_foreign(ours.net, saved(tmp_path, theirs), key="bridge.denoiser")
    x, tau, y = random(2, 3, 16, 16, dtype=torch.float32), torch.tensor([0, 990]), torch.tensor([1, 0])
    with torch.no_grad():
        assert torch.equal(ours.eps(x, tau, y), theirs(tau, x, y)[:, :3])
        assert ours(x, tau, y).shape[1] == (6 if learn_sigma else 3)


def test_guided_diffusion_classifiers_load(tmp_path):
    theirs = shuffled(
        EncoderUNetModel(
            image_size=16,
            in_channels=3,
            model_channels=32,
            out_channels=3,
            num_res_blocks=1,
            attention_resolutions=[2],
            channel_mult=(1, 1),
            num_head_channels=16,
            use_scale_shift_norm=True,
            resblock_updown=True,
            pool="attention",
        )
    )
    ours = NoisyClassifier(TINY, image_size=16, num_classes=3).eval()
    load_foreign(ours.net, saved(tmp_path, theirs), key="bridge.classifier")
    x, tau = random(2, 3, 16, 16, dtype=torch.float32), torch.tensor([0, 990])
    with torch.no_grad():
        assert torch.equal(ours(x, tau), theirs(x, tau))
    large = TINY.model_copy(update={"attention": (16,)})
    for other, message in (
        (NoisyClassifier(TINY, image_size=16, num_classes=2), "3 classes in the file, 2 in the configuration"),
        (NoisyClassifier(large, image_size=32, num_classes=3), r"65 places in the innermost map .* 257"),
    ):
        with pytest.raises(UserError, match=message):
            load_foreign(other.net, tmp_path / "model000100.pt", key="bridge.classifier")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 64}, "32 channels .* in the file, 64 in the configuration"),
        ({"classes": 3}, "2 classes .* in the file, 3 in the configuration"),
        ({"has_null": True}, "2 classes .*null class.* in the file, 3 in the configuration"),
        ({"learn_sigma": True}, "3 output channels .*learn_sigma.* in the file, 6 in the configuration"),
        ({"blocks": 2}, "tensors missing"),
        ({"resblock_updown": False}, "tensors unknown"),
    ],
)
def test_other_architectures_are_named(tmp_path, changes, message):
    file = saved(tmp_path, guided_diffusion_unet())
    with pytest.raises(UserError, match=f"model000100.pt is of another architecture than bridge.denoiser.*{message}"):
        load_foreign(denoiser(**changes).net, file, key="bridge.denoiser")


def test_what_is_no_state_dict_of_tensors_is_refused(tmp_path):
    net = denoiser().net
    file = tmp_path / "model.pt"
    with pytest.raises(UserError, match="is not there"):
        load_foreign(net, file, key="bridge.denoiser")
    torch.save({"net": net}, file)
    with pytest.raises(UserError, match="more than tensors, which is not loaded because it could run"):
        load_foreign(net, file, key="bridge.denoiser")
    file.write_bytes(pickle.dumps(Path("x"), protocol=2))
    with pytest.raises(UserError, match="more than tensors"):
        load_foreign(net, file, key="bridge.denoiser")
    torch.save({"state_dict": net.state_dict()}, file)
    with pytest.raises(UserError, match="expected a flat state dict"):
        load_foreign(net, file, key="bridge.denoiser")
    saved(tmp_path, net).rename(file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="is damaged"):
        load_foreign(net, file, key="bridge.denoiser")


def test_the_attention_order_changes_images_but_no_shape(tmp_path, patch_folder, write_config):
    theirs = shuffled(guided_diffusion_unet(order=True))
    right, wrong = denoiser(new_attention_order=True).eval(), denoiser(new_attention_order=False).eval()
    x, tau, y = random(2, 3, 16, 16, dtype=torch.float32), torch.tensor([0, 990]), torch.tensor([1, 0])
    file = saved(tmp_path, theirs)
    for ours, same in ((right, True), (wrong, False)):
        load_foreign(ours.net, file, key="bridge.denoiser")
        with torch.no_grad():
            assert torch.equal(ours.eps(x, tau, y), theirs(tau, x, y)) == same
    config = write_config(tmp_path, bridge={"denoiser": {"weights": str(file)}})
    with pytest.raises(UserError, match=r"bridge\.denoiser: weights need new_attention_order stated"):
        load_config(config)
    stated = load_config(config, ["bridge.denoiser.new_attention_order=true"])
    assert stated.bridge.denoiser.new_attention_order
    with pytest.raises(UserError, match="source_denoiser needs weights"):
        load_config(write_config(tmp_path, bridge={"source_denoiser": {"channels": 32}}))


def test_cellflows_class_network_becomes_rows_of_a_table(tmp_path):
    net = shuffled(guided_diffusion_unet(classes=2))
    class_emb = shuffled(nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128)), seed=9)
    weights = net.state_dict() | {f"class_emb.{name}": value for name, value in class_emb.state_dict().items()}
    torch.save(weights, tmp_path / "model.pt")
    ours = denoiser(has_null=True).eval()
    load_foreign(ours.net, tmp_path / "model.pt", key="bridge.denoiser")
    x, tau = random(2, 3, 16, 16, dtype=torch.float32), torch.tensor([20, 600])
    with torch.no_grad():
        for y, row in (
            (torch.tensor([1, 0]), class_emb(net.label_emb(torch.tensor([1, 0])))),
            (torch.tensor([2, 2]), 0),
        ):
            net.label_emb.forward = lambda labels, row=row: row
            torch.testing.assert_close(ours.eps(x, tau, y), net(tau, x, y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (24, {"multipliers": (1, 1, 1, 1, 1)}, "image_size=24: not divisible by 16"),
        (16, {"attention": (4,)}, r"no map of side 4 px at 16 px; sides: \[16, 8\]"),
        (16, {"head_channels": 24}, "head_channels: 24 does not divide the width 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, changes, message):
    with pytest.raises(UserError, match=message):
        denoiser(size=size, **changes)


# --- the variational bound --------------------------------------------------------------------------------------------


def test_the_bound_is_zero_for_the_true_posterior_and_a_known_divergence_else():
    x0, noise = random(4, 3, 4, 4).tanh(), random(4, 3, 4, 4, seed=1)
    for tau in (1, 10, 700):
        steps = torch.full((4,), tau)
        x_t = add_noise(x0, noise, steps)
        low, high = -torch.ones_like(x0), torch.ones_like(x0)
        assert step_bound(x0, x_t, steps, noise, low).item() == pytest.approx(0, abs=1e-9)
        abar, beta = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), np.linspace(1e-4, 0.02, 1000)
        posterior = beta[tau] * (1 - abar[tau - 1]) / (1 - abar[tau])
        ratio = posterior / beta[tau]
        expected = 0.5 * (ratio - 1 - np.log(ratio)) / np.log(2)
        assert step_bound(x0, x_t, steps, noise, high).item() == pytest.approx(expected, rel=1e-6)
        # An error of the noise moves the mean by beta / sqrt(1 - beta) / sqrt(1 - abar) times it.
        moved = beta[tau] / np.sqrt(1 - beta[tau]) / np.sqrt(1 - abar[tau]) * 0.1
        expected = 0.5 * moved**2 / posterior / np.log(2)
        assert step_bound(x0, x_t, steps, noise + 0.1, low).item() == pytest.approx(expected, rel=1e-6)


def test_the_first_step_is_a_likelihood_of_256_values():
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None, None, None]
    x_t = torch.full_like(values, 0.1)
    steps = torch.zeros(256, dtype=torch.long)
    for v in (-1.0, 1.0):
        bits = [
            step_bound(values[i : i + 1], x_t[:1], steps[:1], x_t[:1], torch.full((1, 1, 1, 1), v)) for i in range(256)
        ]
        assert sum(2 ** -b.item() for b in bits) == pytest.approx(1, abs=1e-6)


def test_only_the_variance_is_trained_by_the_bound():
    x0, noise = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    tau = torch.tensor([0, 300])
    eps, v = random(2, 3, 4, 4, seed=2).requires_grad_(), torch.zeros(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    step_bound(x0, add_noise(x0, noise, tau), tau, eps, v).backward()
    assert eps.grad is None
    assert (v.grad.abs().sum((1, 2, 3)) > 0).all()


# --- training and use -------------------------------------------------------------------------------------------------


def tiny_bridge(**keys) -> dict:
    train = {"steps": 4, "batch_size": 8, "warmup_steps": 0, "lr": 2e-3, "ema_decay": 0.5, "accelerator": "cpu"}
    size = {"channels": 32, "multipliers": [1, 1], "attention": [], "head_channels": 16, "resblock_updown": False}
    networks = {name: {**size, "train": {**train, "validate_pairs": 8}} for name in ("denoiser", "classifier")}
    return {"timesteps": 10, **networks, **keys}


@pytest.fixture
def tiny(patch_folder, tmp_path, write_config):
    """The file of a small bridge's configuration; keyword arguments are keys of its section."""

    def make(**keys) -> Path:
        split = {"val": 0.2, "test": 0.4}
        return write_config(tmp_path, data={"split": split, "classes": ["A", "B"]}, bridge=tiny_bridge(**keys))

    return make


@pytest.mark.parametrize(("learn_sigma", "guidance"), [(False, "classifier"), (True, "classifier_free")])
def test_denoisers_learn(tiny, learn_sigma, guidance):
    torch.manual_seed(0)
    config = load_config(tiny(learn_sigma=learn_sigma, guidance=guidance, class_dropout=0.5))
    task = DenoiserTask(config, load_patches(config.data, seed=0))
    optimiser = torch.optim.Adam(task.model.parameters(), lr=3e-3)
    before = task.validate(task.model.eval(), torch.device("cpu"))
    head, rows = (w.detach().clone() for w in (task.model.net.out[2].weight, task.model.net.label_emb.weight))
    task.model.train()
    for index in range(25):
        optimiser.zero_grad()
        task.loss(task.model, task.batch(index, rank=0)).backward()
        optimiser.step()
    after = task.validate(task.model.eval(), torch.device("cpu"))
    assert before["val/noise_mse"] == pytest.approx(1, abs=0.1)
    assert after["val/noise_mse"] < 0.6
    assert set(after) >= {"val/noise_mse_early", "val/noise_mse_late", "val/class_swap"}
    moved = (task.model.net.out[2].weight - head).flatten(1).norm(dim=1)
    assert len(moved) == (6 if learn_sigma else 3)
    assert (moved > 1e-3).all()
    null = task.model.net.label_emb.weight[2:]
    assert torch.equal(null, rows[2:]) == (guidance != "classifier_free")  # the null class is told, and learns
    batch = task.batch(0, rank=0)
    assert task.sheet(task.model, torch.device("cpu")) is None
    dropped = batch.y_seen != batch.y
    assert dropped.any() == (guidance == "classifier_free")
    assert (batch.y_seen[dropped] == 2).all()


def test_noisy_classifiers_learn(tiny):
    torch.manual_seed(0)
    config = load_config(tiny())
    task = NoisyClassifierTask(config, load_patches(config.data, seed=0))
    optimiser = torch.optim.Adam(task.model.parameters(), lr=1e-3)
    for index in range(25):
        optimiser.zero_grad()
        loss = task.loss(task.model, task.batch(index, rank=0))
        loss.backward()
        optimiser.step()
    figures = task.validate(task.model.eval(), torch.device("cpu"))
    assert figures["val/accuracy_tau0"] > 0.9
    assert set(figures) == {f"val/accuracy_tau{tau}" for tau in (0, 100, 250, 500, 750)}


def test_batches_are_functions_of_their_number(tiny):
    config = load_config(tiny())
    task = DenoiserTask(config, load_patches(config.data, seed=0))
    first, again, second, other = (task.batch(i, rank=r) for i, r in ((3, 0), (3, 0), (4, 0), (3, 1)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(first.noise, unlike.noise) for unlike in (second, other))
    many = [task.batch(i, rank=0) for i in range(60)]
    tau, y = torch.cat([b.tau for b in many]), torch.cat([b.y for b in many])
    assert 0 <= tau.min() < 20
    assert 979 < tau.max() <= 999
    assert 440 < tau.float().mean() < 560
    assert 0.4 < y.float().mean() < 0.6
    torch.testing.assert_close(first.x_t, add_noise(first.x0, first.noise, first.tau))


def test_from_training_to_trajectories(tiny, tmp_path, capsys):
    file, run = str(tiny()), tmp_path / "runs" / "tiny"
    cli.main(["train-bridge", file])
    printed = capsys.readouterr().out
    assert f"trained: {run / 'denoiser' / 'checkpoints' / 'step-00000004'}" in printed
    assert all(name in printed for name in ("val/noise_mse", "val/accuracy_tau0"))
    assert {path.name for path in run.iterdir()} == {"config.yaml", "splits.csv", "denoiser", "noisy_classifier"}

    # In two parts, and from the run folder: bit for bit the same.
    short = [f"bridge.{name}.train.steps=2" for name in ("denoiser", "classifier")]
    cli.main(["train-bridge", file, f"output={tmp_path / 'parts'}", *short])
    cli.main(["train-bridge", str(tmp_path / "parts"), *(text.replace("=2", "=4") for text in short)])
    for stage in STAGES:
        whole, parts = (
            load_state(root / stage / "checkpoints" / "step-00000004") for root in (run, tmp_path / "parts")
        )
        assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    capsys.readouterr()
    cli.main(["train-bridge", str(run)])
    assert capsys.readouterr().out.count("trained already (4 steps)") == 2
    (tmp_path / "parts").rename(tmp_path / "moved")
    cli.main(["train-bridge", str(tmp_path / "moved")])
    assert not (tmp_path / "parts").exists()
    with pytest.raises(SystemExit, match=r"denoiser: holds another run; they differ in bridge\.denoiser\.channels"):
        cli.main(["train-bridge", file, "bridge.denoiser.channels=64"])
    cli.main(["train-bridge", file, "bridge.scale=1.0", "train.lr=0.5", "translate.num=3"])  # not parts of a training

    options = ["translate.num=3", "translate.levels=4", "translate.batch_size=2"]
    bridge = ReferenceBridge.load(run, options)
    folder, figures = bridge.translate_split(source="A", target="B")
    assert figures["made_now"] == 3
    sequences = load_trajectory(folder)
    assert sequences.header.method == "ddim_bridge"
    assert sequences.levels == (0.0, 0.25, 0.5, 0.75, 1.0)
    depths = uniform_depths(10, 4)
    assert set(sequences.nfe) == {depths[-1] + sum(depths)}
    assert set(sequences.gradients) == {sum(depths)}
    np.testing.assert_allclose(sequences.soft_labels[2], [[0.5, 0.5]] * 3)
    patches = load_patches(bridge.config.data, seed=0)
    sources = torch.from_numpy(sequences.frames[0])
    assert torch.equal(sources, patches.centre([patches.ids.index(name) for name in sequences.source_ids]))
    assert bridge.translate_split(source="A", target="B")[1]["made_now"] == 0

    # Alone, and by another batch size, an image comes to the same.
    alone = ReferenceBridge.load(run, options).translate(sources[1:2], source="A", target="B", batch_size=1)
    assert np.abs(alone.frames[:, 0].astype(int) - sequences.frames[:, 1]).max() <= 1
    unguided = ReferenceBridge.load(run, [*options, "bridge.scale=0"]).translate(sources, source="A", target="B")
    assert set(unguided.gradients) == {0}
    assert unguided.header.config_hash != sequences.header.config_hash


def test_what_does_not_fit_the_bridge_is_said(tiny, tmp_path):
    file, run = tiny(), tmp_path / "runs" / "tiny"
    with pytest.raises(UserError, match="denoiser: holds no checkpoint"):
        ReferenceBridge.load(file)
    cli.main(["train-bridge", str(file), "bridge.guidance=none"])
    assert not (run / "noisy_classifier").exists()
    for overrides, message in (
        ([], "noisy_classifier: holds no checkpoint"),
        (["bridge.guidance=classifier_free"], "has no null class"),
        (["bridge.denoiser.channels=64"], r"was trained otherwise .*bridge\.denoiser\.channels"),
        (["data.image_size=32"], r"was trained otherwise .*data\.image_size"),
        (["bridge.timesteps=7"], "7 does not divide 1000"),
        (["bridge.denoiser={weights: nowhere.pt, new_attention_order: false}"], "nowhere.pt is not there"),
    ):
        with pytest.raises(UserError, match=message):
            ReferenceBridge.load(file, ["bridge.guidance=none"] * (overrides != []) + overrides)
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    for overrides, options, message in (
        ([], {"steps": 3}, r"translate\.steps: has no part in the reference bridge"),
        ([], {"levels": [0.5, 1.0]}, "levels are nominal"),
        ([], {"levels": 10}, "10 levels do not fit"),
        (["bridge.depths=[3, 11]"], {}, "must rise strictly from 1 to at most 10"),
        (["bridge.depths=fourier"], {"levels": 3}, "20 px or more"),
        ([], {"source": "C"}, "'C' is no class"),
    ):
        bridge = ReferenceBridge.load(run, ["bridge.guidance=none", *overrides])
        with pytest.raises(UserError, match=message):
            bridge.translate(images, **options)
    made = ReferenceBridge.load(run, ["bridge.guidance=none", "bridge.depths=[2, 10]"]).translate(images)
    assert (made.levels, made.nfe, made.gradients) == ((0.0, 0.5, 1.0), (22,), (0,))


def test_foreign_weights_take_the_place_of_training(tiny, tmp_path):
    stated = {"new_attention_order": False}
    sizes = tiny_bridge()
    denoiser = shuffled(build_denoiser(load_config(tiny())))
    other = shuffled(build_denoiser(load_config(tiny())), seed=1)
    classifier = shuffled(build_noisy_classifier(load_config(tiny())), seed=2)
    for name, network in (("d", denoiser), ("o", other), ("c", classifier)):
        torch.save(network.net.state_dict(), tmp_path / f"{name}.pt")
    foreign = {
        "denoiser": {**sizes["denoiser"], "weights": str(tmp_path / "d.pt"), **stated},
        "source_denoiser": {**sizes["denoiser"], "weights": str(tmp_path / "o.pt"), **stated},
        "classifier": {**sizes["classifier"], "weights": str(tmp_path / "c.pt"), **stated},
    }
    file = tiny(**foreign)
    with pytest.raises(SystemExit, match="nothing to train"):
        cli.main(["train-bridge", str(file)])
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    bridge = ReferenceBridge.load(file)
    made = bridge.translate(images, levels=2)
    expected = bridge_stairs(
        images.float() / 127.5 - 1,
        torch.tensor([0, 0]),
        torch.tensor([1, 1]),
        schedule=respaced(10),
        encoder=Conditional(other.eps),
        decoder=Conditional(denoiser.eps),
        depths=torch.tensor([5, 9]),
        classifier=classifier,
        scale=2.0,
    ).frames
    expected = ((expected + 1) * 127.5).round().clamp(0, 255)
    assert np.abs(made.frames - expected.numpy()).max() <= 1
    first = made.header.config_hash
    torch.save(shuffled(build_denoiser(load_config(tiny())), seed=5).net.state_dict(), tmp_path / "d.pt")
    assert ReferenceBridge.load(tiny(**foreign)).translate(images, levels=2).header.config_hash != first
    # A denoiser of others' and a classifier of one's own.
    cli.main(["train-bridge", str(tiny(denoiser=foreign["denoiser"]))])
    run = tmp_path / "runs" / "tiny"
    assert not (run / "denoiser").exists()
    assert (run / "noisy_classifier" / "checkpoints").is_dir()
    assert ReferenceBridge.load(run).translate(images, levels=2).nfe == (23, 23)


def test_classifier_free_bridges_train_and_translate(tiny, tmp_path):
    cli.main(["train-bridge", str(tiny(guidance="classifier_free"))])
    run = tmp_path / "runs" / "tiny"
    assert not (run / "noisy_classifier").exists()
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    made = ReferenceBridge.load(run).translate(images, levels=3)
    depths = uniform_depths(10, 3)
    assert (made.nfe, made.gradients) == ((2 * (depths[-1] + sum(depths)),), (0,))
    assert ReferenceBridge.load(run, ["bridge.guidance=none"]).translate(images, levels=3).nfe[0] * 2 == made.nfe[0]


def test_a_flows_folder_is_not_taken(tiny, tmp_path):
    (tmp_path / "runs" / "tiny" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit, match="holds a flow's run; choose another output"):
        cli.main(["train-bridge", str(tiny())])
    with pytest.raises(SystemExit, match=r"bridge\.classifier\.train\.precision: both networks"):
        cli.main(["train-bridge", str(tiny()), "bridge.classifier.train.precision=bf16-mixed"])


@pytest.mark.parametrize("name", ["bridge_phantom", "bridge_lung"])
def test_the_shipped_configurations_build_at_their_stated_sizes(name):
    config = load_config(Path(__file__).parents[1] / "configs" / f"{name}.yaml")
    sizes = [sum(p.numel() for p in build(config).parameters()) for build in (build_denoiser, build_noisy_classifier)]
    assert 4e6 < sizes[0] < 6e6
    assert sizes[1] < 1.5e6
    assert uniform_depths(config.bridge.timesteps, config.translate.levels)[-1] == 99
    json.dumps(config.model_dump(mode="json"))
