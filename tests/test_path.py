"""Paths: the regression target is the state's derivative, and the noise is what noise_scale says."""

import math

import pytest
import torch
from torchcfm import SchrodingerBridgeConditionalFlowMatcher
from toy_flow import sample

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import registry
from cellflux_bridge.path.brownian import Brownian
from cellflux_bridge.path.gaussian_source import GaussianSource
from cellflux_bridge.path.noised_source import NoisedSource
from cellflux_bridge.path.smooth import Smooth
from cellflux_bridge.path.straight import Straight

PATHS = {
    "straight": Straight(),
    "noised_source": NoisedSource(scale=0.7),
    "noised_source_coin": NoisedSource(scale=0.7, probability=0.5),
    "brownian": Brownian(scale=0.7, margin=0.05),
    "smooth": Smooth(scale=0.7),
    "gaussian_source": GaussianSource(),
}


ONE_LAW = [name for name in PATHS if name != "noised_source_coin"]  # with a coin the state is a mixture


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(num: int, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    x0, x1 = torch.rand(2, num, 3, size, size, generator=generator(9), dtype=torch.float64) * 2 - 1
    return x0, x1


def test_every_path_of_the_folder_is_tested():
    assert {name.removesuffix("_coin") for name in PATHS} == set(registry.names("path"))


def test_u_t_is_the_derivative_of_x_t(path):
    x0, x1 = pair(16)
    low, high = max(path.t_start, 1e-4), 1 - max(path.margin, 1e-4)
    t, h = torch.linspace(low, high, 16, dtype=torch.float64), 1e-6
    before = sample(path, x0, x1, t - h, generator()).x_t
    after = sample(path, x0, x1, t + h, generator()).x_t
    u_t = sample(path, x0, x1, t, generator()).u_t
    torch.testing.assert_close((after - before) / (2 * h), u_t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ONE_LAW, indirect=True)
def test_noise_has_the_deviation_that_noise_scale_says(path):
    x0, x1 = (x[:1].expand(20_000, -1, -1, -1) for x in pair(1, size=1))
    for t in (0.1, 0.5, 0.85):
        times = torch.full((len(x0),), t, dtype=torch.float64)
        x_t = sample(path, x0, x1, times, generator()).x_t
        mean = t * x1[0] + (1 - t) * x0[0] * (0 if not path.from_data else 1)
        scale = path.noise_scale(torch.tensor(t, dtype=torch.float64)).item()
        torch.testing.assert_close(x_t.mean(0), mean, atol=0.02, rtol=0)
        torch.testing.assert_close(x_t.std(0), torch.full_like(x_t[0], scale), atol=1e-12, rtol=0.02)


@pytest.mark.parametrize("path", ONE_LAW, indirect=True)
def test_noise_rate_is_the_slope_of_noise_scale(path):
    t, h = torch.linspace(0.02, 0.98, 49, dtype=torch.float64), 1e-6
    slope = (path.noise_scale(t + h) - path.noise_scale(t - h)) / (2 * h)
    torch.testing.assert_close(path.noise_rate(t), slope, rtol=1e-6, atol=1e-6)
    assert path.noise_rate(t).shape == t.shape


def test_the_noise_of_a_clean_start_has_no_slope():
    path, t = NoisedSource(scale=0.7, probability=0.5, noisy_start=False), torch.linspace(0, 1, 5)
    assert torch.equal(path.noise_rate(t), torch.zeros(5))
    assert torch.equal(path.noise_scale(t), torch.zeros(5))


def test_ends_of_a_path_are_source_and_target():
    x0, x1 = pair(4)
    for name in ("straight", "smooth"):
        start = sample(PATHS[name], x0, x1, torch.zeros(4, dtype=torch.float64), generator())
        torch.testing.assert_close(start.x_t, x0)
    for name in ("straight", "noised_source", "noised_source_coin", "smooth", "gaussian_source"):
        end = sample(PATHS[name], x0, x1, torch.ones(4, dtype=torch.float64), generator())
        torch.testing.assert_close(end.x_t, x1)


def test_coloured_noise_is_as_bright_and_less_coloured():
    path, (x0, x1) = NoisedSource(scale=0.7, colour=0.25), (x[:1].expand(20_000, 3, -1, -1) for x in pair(1, size=1))
    noise = sample(path, x0, x1, torch.full((len(x0),), 0.5, dtype=torch.float64), generator()).x_t - (x0 + x1) / 2
    brightness = noise.mean(1)
    assert brightness.std().item() == pytest.approx(0.35 / 3**0.5, rel=0.02)
    assert (noise[:, 0] - noise[:, 1]).std().item() == pytest.approx(0.25 * 0.35 * 2**0.5, rel=0.02)
    drawn = torch.randn(4, 3, 2, 2, generator=generator())
    torch.testing.assert_close(path.start(torch.zeros(4, 3, 2, 2), drawn), 0.7 * path.coloured(drawn))
    kept = path.without_noise(0.5 * path.start(torch.zeros(4, 3, 2, 2), drawn), torch.tensor(0.5), drawn)
    torch.testing.assert_close(kept, torch.zeros(4, 3, 2, 2))


def test_the_coin_of_noised_source_falls_for_each_sample():
    x0, x1 = pair(2000)
    x_t = sample(PATHS["noised_source_coin"], x0, x1, torch.zeros(2000, dtype=torch.float64), generator()).x_t
    noised = (x_t - x0).abs().amax(dim=(1, 2, 3)) > 0
    assert 0.45 < noised.double().mean() < 0.55
    assert (x_t - x0)[noised].std().item() == pytest.approx(0.7, rel=0.02)


def test_only_noise_on_every_sample_says_so():
    assert {name for name, p in PATHS.items() if p.noise_on_every_sample} == {"noised_source", "brownian"}
    assert {name for name, p in PATHS.items() if p.reversible} == {"straight"}
    assert {name for name, p in PATHS.items() if not p.from_data} == {"gaussian_source"}


def test_brownian_follows_its_formula():
    scale, path = 0.7, PATHS["brownian"]
    x0, x1 = pair(8)
    t = torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
    x_t, u_t = sample(path, x0, x1, t, generator())
    s = t.view(-1, 1, 1, 1)
    mu = (1 - s) * x0 + s * x1
    z = torch.randn(x0.shape, generator=generator()).double()
    torch.testing.assert_close(x_t, mu + scale * (s * (1 - s)).sqrt() * z)
    torch.testing.assert_close(u_t, (1 - 2 * s) / (2 * s * (1 - s)) * (x_t - mu) + x1 - x0, rtol=1e-6, atol=1e-6)


def test_smooth_follows_its_formula():
    x0, x1 = pair(8)
    t = torch.linspace(0, 1, 8, dtype=torch.float64)
    x_t, u_t = sample(PATHS["smooth"], x0, x1, t, generator())
    s, z = t.view(-1, 1, 1, 1), torch.randn(x0.shape, generator=generator()).double()
    torch.testing.assert_close(x_t, (1 - s) * x0 + s * x1 + 0.7 * torch.sin(math.pi * s) ** 2 * z)
    torch.testing.assert_close(u_t, x1 - x0 + 0.7 * math.pi * torch.sin(2 * math.pi * s) * z)


def test_times_are_uniform_in_their_interval(path):
    times = torch.cat([path.times(64, generator=generator(seed)) for seed in range(100)])
    assert times.min() >= path.t_start
    assert times.max() <= 1 - path.margin
    fractions = ((times - path.t_start) / (1 - path.margin - path.t_start)).sort().values
    expected = (torch.arange(len(times)) + 0.5) / len(times)
    assert (fractions - expected).abs().max() < 0.02  # Kolmogorov-Smirnov distance to the uniform law


def test_one_batch_of_times_covers_the_interval_in_random_order(path):
    times = path.times(64, generator=generator())
    fractions = (times - path.t_start) / (1 - path.margin - path.t_start)
    assert sorted((fractions * 64).long().tolist()) == list(range(64))
    assert not torch.equal(times, times.sort().values)


def test_draws_repeat_with_their_generator_and_differ_without(path):
    x0, x1 = (x.float() for x in pair(4))
    t = path.times(4, generator=generator())
    first, again, other = (sample(path, x0, x1, t, generator(seed)) for seed in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert first.x_t.dtype == first.u_t.dtype == torch.float32
    assert torch.equal(first.x_t, other.x_t) == (path is PATHS["straight"])


@pytest.mark.parametrize("path", ONE_LAW, indirect=True)
def test_start_is_the_conditional_paths_own_state_at_t_start(path):
    x0, x1 = pair(4)
    noise = torch.randn(x0.shape, generator=generator()).double()
    t = torch.full((4,), path.t_start, dtype=torch.float64)
    x_t = sample(path, x0, x1, t, generator()).x_t
    torch.testing.assert_close(path.start(x0, noise), x_t - path.t_start * (x1 - x0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["straight", "noised_source", "brownian", "gaussian_source"])
def test_without_noise_leaves_the_blend_along_a_conditional_path(name):
    path, (x0, x1) = PATHS[name], pair(4)
    noise = torch.randn(x0.shape, generator=generator()).double()
    for t in (path.t_start, 0.3, 0.8, 1.0):
        time = torch.tensor(t, dtype=torch.float64)
        x_t = sample(path, x0, x1, time.expand(4), generator()).x_t
        blend = t * x1 + (1 - t) * x0 * path.from_data
        torch.testing.assert_close(path.without_noise(x_t, time, noise), blend, rtol=0, atol=1e-9)


def test_nothing_is_subtracted_at_the_end(path):
    x = torch.randn(2, 3, 4, 4, generator=generator())
    shown = path.without_noise(x, torch.tensor(1.0, dtype=torch.float64), torch.ones_like(x))
    assert torch.equal(shown, x)


def test_smooth_shows_its_states_as_they_are():
    x = torch.randn(2, 3, 4, 4, generator=generator())
    assert torch.equal(PATHS["smooth"].without_noise(x, torch.tensor(0.5), torch.ones_like(x)), x)
    assert torch.equal(PATHS["smooth"].start(x, torch.ones_like(x)), x)


def test_a_clean_start_may_be_asked_of_the_coin():
    path = NoisedSource(scale=0.7, probability=0.5, noisy_start=False)
    x = torch.randn(2, 3, 4, 4, generator=generator())
    assert torch.equal(path.start(x, torch.ones_like(x)), x)
    assert torch.equal(path.without_noise(x, torch.tensor(0.5), torch.ones_like(x)), x)


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("noised_source", "scale", (0.0, -1.0, float("nan"))),
        ("noised_source", "probability", (0.0, 1.5)),
        ("noised_source", "noisy_start", (False,)),  # beside probability 1
        ("brownian", "scale", (0.0,)),
        ("brownian", "margin", (0.0, 0.5)),
        ("smooth", "scale", (0.0,)),
    ],
)
def test_impossible_arguments_are_refused_by_name(name, key, values):
    for value in values:
        with pytest.raises(UserError, match=rf"path\.{key}"):
            registry.build("path", registry.validate("path", {"name": name, key: value}, key="path"))


def test_the_brownian_path_is_that_of_torchcfm():
    matcher, path = SchrodingerBridgeConditionalFlowMatcher(sigma=0.7), Brownian(scale=0.7, margin=0.02)
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(6, 3, 4, 4, generator=generator) for _ in range(2))
    t = path.times(6, generator=generator)
    state = generator.get_state()
    x_t, u_t = sample(path, x0, x1, t, generator)
    eps = torch.randn(x0.shape, generator=generator.set_state(state))
    torch.testing.assert_close(x_t, matcher.sample_xt(x0, x1, t, eps))
    torch.testing.assert_close(u_t, matcher.compute_conditional_flow(x0, x1, t, x_t), rtol=1e-4, atol=1e-4)
