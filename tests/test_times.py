"""Laws of training times: their quantiles in closed form, and where a flow draws from them."""

import pytest
import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import load_config, registry
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.flow.task import FlowTask
from cellflux_bridge.path.brownian import Brownian

SHARES = torch.tensor([0.0, 0.15865525, 0.5, 0.84134475, 1.0])  # of a normal law below -inf, -1, 0, 1, inf


def law(name, **arguments):
    return registry.build("times", registry.validate("times", {"name": name, **arguments}, key="times"))


def test_uniform_times_are_their_shares():
    assert torch.equal(law("uniform").quantiles(SHARES), SHARES)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.0), (1.0, 0.25)])
def test_logits_of_logit_normal_times_are_normal(mean, std):
    times = law("logit_normal", mean=mean, std=std).quantiles(SHARES)
    assert times.dtype == SHARES.dtype
    assert times[0] == 0
    assert times[-1] == 1
    expected = torch.tensor([mean - std, mean, mean + std])
    torch.testing.assert_close(times[1:-1].logit(), expected, rtol=0, atol=1e-5)


def test_a_path_draws_a_law_within_its_interval():
    path = Brownian()
    times = path.times(1001, generator=torch.Generator().manual_seed(0), quantiles=lambda shares: shares**2)
    parts = (times - path.t_start) / (1 - path.margin - path.t_start)
    assert times.min() >= path.t_start
    assert times.max() <= 1 - path.margin
    assert abs(parts.median() - 0.25) < 0.002
    assert abs((parts < 0.01).float().mean() - 0.1) < 0.002


def test_a_flow_trains_at_times_of_the_law_and_is_validated_at_uniform_ones(patch_folder, tmp_path, write_config):
    def task(*keys):
        config = load_config(file, keys)
        patches = load_patches(config.data, seed=config.seed)
        data = config.data.model_copy(update={"classes": list(patches.classes)})
        return FlowTask(config.model_copy(update={"data": data}), patches)

    file = write_config(tmp_path, train={"batch_size": 8, "validate_pairs": 16})
    plain, late = task(), task("times={name: logit_normal, mean: 3, std: 0.5}")
    before, after = plain.batch(0, rank=0), late.batch(0, rank=0)
    expected = law("logit_normal", mean=3, std=0.5).quantiles(before.t)
    torch.testing.assert_close(after.t, expected, rtol=0, atol=1e-6)
    assert torch.equal(after.noise, before.noise)
    held_out = [next(of.validation_batches(torch.device("cpu"))).t for of in (plain, late)]
    assert torch.equal(*held_out)


def test_a_law_of_no_width_is_refused():
    with pytest.raises(UserError, match=r"times\.std"):
        law("logit_normal", std=0)
