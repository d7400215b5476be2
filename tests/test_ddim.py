"""DDIM stairs against equations written out again and closed forms."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_ddim import SIDE, TINY, random, shuffled, toy_classifier, toy_eps, toy_stairs, written_out

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.ddim import stairs
from cellflux_bridge.ddim.depths import fourier_depths, low_frequency_magnitudes, uniform_depths
from cellflux_bridge.ddim.networks import Denoiser, NoisyClassifier
from cellflux_bridge.ddim.schedule import add_noise, alphas_bar, respaced
from cellflux_bridge.ddim.stairs import ddim_stairs, fourier_rule
from cellflux_bridge.ddim.steps import NoisePredictor, classifier_gradient

# --- schedule ---------------------------------------------------------------------------------------------------------


def guided_diffusions_steps(num: int) -> list[int] | None:
    """What "ddim<num>" means in guided-diffusion: the first stride that takes so many of 1000 steps."""
    for stride in range(1, 1000):
        if len(range(0, 1000, stride)) == num:
            return list(range(0, 1000, stride))
    return None


@pytest.mark.parametrize("timesteps", [1000, 500, 334, 100, 72, 63, 30, 25, 7, 3, 2])
def test_the_schedule_is_ddpms_respaced(timesteps):
    products = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    schedule = respaced(timesteps)
    assert schedule.tau.tolist() == guided_diffusions_steps(timesteps)
    assert (len(schedule), schedule.at(-1), schedule.at(timesteps)) == (timesteps, 1.0, 0.0)
    found = [schedule.at(k) for k in range(timesteps)]
    np.testing.assert_allclose(found, products[schedule.tau], rtol=1e-12)
    assert schedule.at(0) == pytest.approx(0.9999, abs=1e-12)


def test_only_numbers_of_steps_that_no_stride_gives_are_refused():
    for timesteps in [*range(1, 80), 100, 333, 334, 499, 500, 501, 999, 1000, 1001]:
        if (steps := guided_diffusions_steps(timesteps)) is not None:
            assert respaced(timesteps).tau.tolist() == steps
    for timesteps, near in ((1, "2 or 3"), (61, "59 or 63"), (999, "500 or 1000")):
        assert guided_diffusions_steps(timesteps) is None
        with pytest.raises(UserError, match=rf"ddim\.timesteps: .* {timesteps} of 1000 steps; use {near}"):
            respaced(timesteps)


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

    result = ddim_stairs(
        x0,
        torch.zeros(2, dtype=torch.long),
        torch.ones(2, dtype=torch.long),
        schedule=respaced(10),
        encoder=NoisePredictor(denoiser.eps),
        decoder=NoisePredictor(denoiser.eps),
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

    return NoisePredictor(eps)


def test_normal_classes_are_carried_onto_each_other():
    """DDIM's ODE carries a normal law onto another by x -> m1 + (x - m0) s1 / s0; the error falls with the step."""
    means, spreads = torch.tensor([-0.4, 0.5], dtype=torch.float64), torch.tensor([0.3, 0.6], dtype=torch.float64)
    x0 = -0.4 + 0.3 * random(4, 3, 4, 4)
    there = 0.5 + (x0 + 0.4) * 2.0
    errors = {"there": [], "back": []}
    for timesteps in (250, 1000):
        eps = gaussian_eps(means, spreads)
        for name, target, expected in (("there", 1, there), ("back", 0, x0)):
            result = ddim_stairs(
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
    guided = NoisePredictor(toy_eps, null_class=2, weight=1.8)
    null = toy_eps(x, tau, torch.tensor([2, 2]))
    torch.testing.assert_close(guided(x, tau, y), 2.8 * toy_eps(x, tau, y) - 1.8 * null)
    torch.testing.assert_close(NoisePredictor(toy_eps, null_class=2, weight=0.0)(x, tau, y), toy_eps(x, tau, y))
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
    network = NoisePredictor(eps) if kind == "conditional" else NoisePredictor(eps, null_class=2, weight=1.0)
    side = 20 if callable(depths) else 2
    seen = []
    result = ddim_stairs(
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
        network = NoisePredictor(fading)
        return ddim_stairs(
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


@pytest.mark.parametrize("room", [1, 2, 3])
def test_memory_of_the_rules_is_bounded_and_changes_nothing(monkeypatch, room):
    """Whatever number of images a rule sees at a time: the same frames and depths, and no forward more."""
    x0, schedule = random(5, 3, 20, 20).tanh(), respaced(20)
    seen = []

    def eps(x, tau, y):
        return torch.sin(3 * x + tau[:, None, None, None].double() / 300 + y[:, None, None, None])

    def rule(states):
        seen.append(tuple(states.shape))
        return fourier_rule(3, mirrored=True)(states)

    def run():
        network, y = NoisePredictor(eps), torch.tensor([0, 1, 0, 1, 1])
        return ddim_stairs(x0, y, 1 - y, schedule=schedule, encoder=network, decoder=network, depths=rule)

    whole = run()
    monkeypatch.setattr(stairs, "_STATES_BYTES", (room + 1) * 20 * 3 * 20 * 20 * 8 - 1)
    parts = run()
    assert seen[0] == (20, 5, 3, 20, 20)
    assert [shape[1] for shape in seen[1:]] == [room] * (5 // room) + [5 % room] * (5 % room > 0)
    for found, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_uniform_depths_span_the_levels():
    assert uniform_depths(100, 10) == [10, 20, 30, 40, 50, 60, 70, 80, 90, 99]
    assert uniform_depths(25, 10) == [3, 5, 8, 10, 13, 15, 18, 20, 23, 24]
    assert uniform_depths(1000, 2) == [500, 999]
    for timesteps in (10, 25, 50, 100):
        for num in range(1, timesteps):
            depths = uniform_depths(timesteps, num)
            assert depths == sorted(set(depths))
            assert 1 <= depths[0] <= depths[-1] == timesteps - 1
    with pytest.raises(UserError, match=r"10 levels do not fit into ddim\.timesteps=10"):
        uniform_depths(10, 10)


@pytest.mark.parametrize("depths", [[3, 3], [5, 2], [0, 4], [4, 21]])
def test_wrong_depths_are_refused(depths):
    with pytest.raises(UserError, match=r"ddim\.depths: must rise strictly from 1 to at most 20"):
        toy_stairs(random(1, 3, SIDE, SIDE), torch.tensor(depths))
