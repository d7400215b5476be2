"""The perceptual loss of nuclei: its gradient, what it sees, and where a flow and a refiner have it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn_nuclei import discs

from cellflux_bridge import checkpoint, cli, images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.flow.shortcut import ShortcutTask
from cellflux_bridge.flow.task import FlowTask, velocity_error
from cellflux_bridge.perceptual.nuclei import NucleiLoss
from cellflux_bridge.refiner.task import RefinerTask
from cellflux_bridge.velocity.base import late_weight

HALF = "perceptual.share=0.5"
BY_LEVEL = ("condition.target=level", "condition.source_image=true", "condition.source_class=false")
REFINED = ("refiner.scale=0.4", "refiner.velocity.channels=8", "refiner.train.steps=2", "refiner.train.batch_size=8")


@pytest.fixture
def file(tmp_path, patch_folder, write_config):
    return write_config(tmp_path)


def read(file, *overrides: str):
    config = load_config(file, overrides)
    patches = load_patches(config.data, seed=config.seed)
    data = config.data.model_copy(update={"classes": list(patches.classes)})
    return config.model_copy(update={"data": data}), patches


def encoded(*stacks) -> list[torch.Tensor]:
    return [images.encode(torch.from_numpy(one.copy()).permute(2, 0, 1)[None]) for one in stacks]


def test_a_lost_outline_counts_more_than_a_tint_of_the_same_error(file):
    loss = NucleiLoss(*read(file, HALF))
    loss._factor = 1.0
    pairs = [(y, x + side) for y in (24, 72) for x in (24, 72) for side in (-7, 7)]
    apart, blob = discs(pairs, radius=6)[0], discs([(y, x) for y in (24, 72) for x in (24, 72)], radius=9)[0]
    real, merged = encoded(apart, blob)
    tinted = real + (merged - real).square().mean().sqrt()
    assert (tinted - real).square().mean() == pytest.approx((merged - real).square().mean().item())
    assert loss.distance(real, real) == 0
    assert loss.distance(merged, real) > 2 * loss.distance(tinted, real)


def test_its_gradient_has_the_asked_length_and_the_distances_direction(file):
    loss = NucleiLoss(*read(file, HALF))
    generator = torch.Generator().manual_seed(0)
    made, real, of_error = (torch.randn(3, 3, 16, 16, generator=generator) for _ in range(3))
    made.requires_grad_()
    value = loss(made, real, of_error)
    found, direction = (torch.autograd.grad(of, made)[0] for of in (value, loss.distance(made, real)))
    assert value.item() == 0
    assert found.norm().item() == pytest.approx(0.5 * of_error.norm().item(), rel=1e-4)
    assert torch.cosine_similarity(found.flatten(), direction.flatten(), dim=0) > 0.9999


@pytest.mark.parametrize("predict", ["velocity", "endpoint"])
def test_a_flow_has_it_at_the_ends_of_late_times_alone(file, predict):
    task = FlowTask(*read(file, HALF, "perceptual.after=0.4", f"velocity.predict={predict}"))
    batch = task.states(task.batch(0, rank=0)._replace(t=torch.tensor([0.0, 0.3, 0.4, 0.41, 0.5, 0.7, 0.9, 0.99])))
    v = (batch.u_t + 0.1 * torch.randn(batch.u_t.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    both = velocity_error(v, batch.u_t, late_weight(batch.t)), task.perceptual_loss(v, batch)
    squared, of_nuclei = (torch.autograd.grad(of, v)[0] for of in both)
    assert torch.equal(of_nuclei.flatten(1).any(1), batch.t > 0.4)
    left = (1 - batch.t[3:])[:, None, None, None]  # an end moves by so much of its velocity
    assert ((of_nuclei[3:] / left).norm() / (squared[3:] / left).norm()).item() == pytest.approx(0.5, rel=1e-4)
    early = batch._replace(t=torch.full((8,), 0.2))
    assert not torch.is_tensor(task.perceptual_loss(v, early))


def test_shortcuts_have_it_where_they_learn_the_flow(file, monkeypatch):
    keys = (*BY_LEVEL, HALF, "shortcut.steps=4", "shortcut.train.batch_size=8")
    task = ShortcutTask(*read(file, *keys))
    batch = task.batch(0, rank=0)
    t = torch.where(batch.step > 0, batch.drawn.t, torch.linspace(0.1, 0.9, 8))
    batch = batch._replace(drawn=batch.drawn._replace(t=t))
    states = task.states(batch.drawn)
    monkeypatch.setattr(task, "_target", lambda model, t, x, cond, step: torch.zeros_like(x))
    v = torch.randn(states.u_t.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    seen = torch.autograd.grad(task.loss(lambda t, x, cond: v, batch), v)[0]
    monkeypatch.setattr(task, "perceptual_loss", lambda *_: 0.0)
    differs = seen - torch.autograd.grad(task.loss(lambda t, x, cond: v, batch), v)[0]
    rows = (batch.step == 0) & (t > 0.2)
    assert torch.equal(differs.flatten(1).any(1), rows)
    left = (1 - t[rows])[:, None, None, None]
    squared = torch.autograd.grad(velocity_error(v, states.u_t, late_weight(t)), v)[0][rows] / left
    assert (differs[rows] / left).norm().item() == pytest.approx(0.5 * squared.norm().item(), rel=1e-4)


def test_a_refiner_has_it_where_noise_hides_outlines(file):
    plain, seeing = (RefinerTask(*read(file, *REFINED, *more)) for more in ((), (HALF,)))
    batch = plain.batch(0, rank=0)
    error = (0.1 * torch.randn(batch.noise.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()

    def told(t, x, cond):
        return batch.noise + error

    values = [task.loss(told, batch) for task in (plain, seeing)]
    assert values[0].item() == values[1].item()
    squared, both = (torch.autograd.grad(value, error)[0] for value in values)
    differs = (both - squared).flatten(1).any(1)
    assert torch.equal(differs, batch.sigma > 0.1)
    sigma = batch.sigma[differs][:, None, None, None]  # an image moves by so much of the noise
    lengths = ((of[differs] / sigma).norm().item() for of in (both - squared, squared))
    assert next(lengths) == pytest.approx(0.5 * next(lengths), rel=1e-4)


def test_windows_are_seen_at_the_scale_of_whole_patches(file, monkeypatch):
    loss, sizes = NucleiLoss(*read(file, HALF)), []
    monkeypatch.setattr(loss._network, "maps", lambda x: sizes.append(tuple(x.shape[2:])) or [x] * 5)
    loss._factor = 2.0
    for height, width in ((16, 16), (32, 16), (64, 64)):
        loss.distance(torch.zeros(1, 3, height, width), torch.zeros(1, 3, height, width))
    assert sizes[::2] == [(32, 32), (64, 32), (128, 128)]


def test_what_it_cannot_look_at_is_refused_by_name(file):
    with pytest.raises(UserError, match=r"perceptual.share=0.5: .*path.name=brownian is not straight"):
        FlowTask(*read(file, HALF, "path=brownian"))
    config, patches = read(file, HALF)
    with pytest.raises(UserError, match=r"perceptual.share=0.5: .*no nuclei in the training patches of .*patches"):
        NucleiLoss(config, replace(patches, pixels=np.full_like(patches.pixels, 250)))
    grey = config.model_copy(update={"data": config.data.model_copy(update={"channels": 1})})
    with pytest.raises(UserError, match=r"perceptual.share=0.5: .*data.channels=1; set perceptual.share=0"):
        NucleiLoss(grey, patches)


def test_a_run_trains_with_it_and_keeps_to_it(file, tmp_path):
    digests = []
    for number, keys in enumerate(((), (HALF,), (HALF,))):
        output = tmp_path / "runs" / str(number)
        cli.main(["train", str(file), f"output={output}", *keys, *REFINED])
        found = checkpoint.read_config(checkpoint.latest(output))
        assert found.perceptual.share == (0.5 if keys else 0)
        weights = [
            b"".join(of.read_bytes() for of in sorted(checkpoint.latest(part).glob("*.safetensors")))
            for part in (output, output / "refiner")
        ]
        digests.append(weights)
    assert digests[1] == digests[2]
    assert all(a != b for a, b in zip(digests[0], digests[1], strict=True))
    with pytest.raises(SystemExit, match=r"perceptual.share \(0.5 there, 0.2 here\)"):
        cli.main(["train", str(file), f"output={output}", *REFINED, "perceptual.share=0.2", "train.steps=6"])
