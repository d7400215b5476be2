"""Shortcuts: mean velocities in closed form, what they learn from, and what they do to a run's stairs."""

import pytest
import torch
from toy_flow import FROM_DATA, column, drawn_to_level, flow_of, noise_of, sources

from cellflux_bridge import Bridge, checkpoint, cli
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.flow.network import build_flow
from cellflux_bridge.flow.shortcut import ShortcutTask, build_shortcut, mean_velocity
from cellflux_bridge.transport.progression import Progression

LEVELS = torch.tensor([0.25, 0.5, 1.0])


def exact(t, x, cond):
    """The mean velocity over a step d of dx/dt = -2 (x - c): (c - x) (1 - exp(-2 d)) / d."""
    d = column(cond.step)
    return (column(cond.level[:, 1]) - x) * (1 - (-2 * d).exp()) / d


class Exact:
    steps = 4

    def __call__(self, num):
        return lambda t, x, cond: mean_velocity(exact, torch.full_like(t, 1 / num), t, x, cond)


def flow():
    made = flow_of(FROM_DATA["noised_source"], drawn_to_level)
    return type(made)(**{**vars(made), "shortcut": Exact()})


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_exact_mean_velocities_reach_the_end_in_any_number_of_steps(steps):
    method, x0 = Progression(steps=steps, solver="shortcut"), sources()
    found = method.carry(flow(), x0, noise=noise_of(), levels=LEVELS, meter=None)
    start = FROM_DATA["noised_source"].start(x0, noise_of())
    for level, frame in zip(LEVELS, found.frames[1:], strict=True):
        expected = level + (start - level) * torch.tensor(-2.0).exp()
        torch.testing.assert_close(frame, expected, rtol=0, atol=1e-5)
    assert found.nfe == 3 * steps


@pytest.mark.parametrize("steps", [2, 4])
def test_the_way_back_to_a_sources_noise_corrects_the_flows_own_twice_by_what_shortcuts_give(steps):
    """Toward c = 0 a midpoint step h back is a factor 1 + 2 h + 2 h^2, a shortcut d a factor exp(-2 d)."""
    method, x0 = Progression(steps=steps, solver="shortcut", noise_resampling=0.0), sources()
    factor, forth = 1.625 ** (4 // steps), torch.tensor(-2 / steps).exp()
    for _ in range(2):
        factor = factor + (1 - forth * factor) / 2
    found, forwards = method.inverted(flow(), x0)
    torch.testing.assert_close(found, x0 * factor**steps, rtol=0, atol=1e-5)
    assert forwards == 8 + 2 * steps
    assert method.carry(flow(), x0, noise=noise_of(), levels=LEVELS, meter=None).nfe == forwards + 3 * steps


# What they learn

BY_LEVEL = ("condition.target=level", "condition.source_image=true", "condition.source_class=false")
SHORT = ("shortcut.steps=4", "shortcut.train.steps=3", "shortcut.train.batch_size=8")
MANY = ("translate.method=progression", "translate.levels=3", "translate.num=4", "translate.guidance.form=none")
FEW = (*MANY, "translate.solver=shortcut", "translate.steps=2")


@pytest.fixture
def file(tmp_path, patch_folder, write_config):
    return write_config(tmp_path, data={"image_size": 16})


@pytest.fixture
def run(file, tmp_path):
    cli.main(["train", str(file), *BY_LEVEL, *SHORT])
    return tmp_path / "runs" / "tiny"


def test_shortcuts_begin_as_the_flow_and_learn_from_their_halves(run):
    config = load_config(run / "config.yaml")
    task = ShortcutTask(config, load_patches(config.data, seed=config.seed))
    task.begin()
    drawn = [task.batch(index, rank=0) for index in range(20)]
    for step, t in ((of.step, of.drawn.t) for of in drawn):
        assert (step == 0).sum() == 6  # a quarter of a batch learns steps
        assert torch.equal((t / step)[step > 0].frac(), torch.zeros(2))
        assert (t + step <= 1).all()
    assert torch.equal(torch.cat([of.step for of in drawn]).unique(), torch.tensor([0, 0.25, 0.5, 1]))
    assert len(torch.cat([of.drawn.t[of.step == 0] for of in drawn]).unique()) > 100
    whole = task._with_steps(drawn[0].drawn, 1.0, "val")
    t, x, _, cond = task.states(whole.drawn)
    step = whole.step
    assert sorted((step == length).sum().item() for length in (0.25, 0.5, 1)) == [2, 3, 3]
    u = task.states(drawn[0].drawn).u_t
    states, told, _ = task._found(lambda t, x, cond: u if len(t) == 8 else x, drawn[0])
    assert torch.equal((told == states.u_t).flatten(1).all(1), drawn[0].step == 0)  # flow matching
    trained = build_flow(config)[1].eval()
    checkpoint.load_weights(checkpoint.latest(run), trained)
    for length in (1.0, 0.25):
        begun = mean_velocity(task.model, torch.full_like(t, length), t, x, cond)
        torch.testing.assert_close(begun, trained(t, x, cond), rtol=0, atol=1e-6)

    task._flow = torch.nn.Module()  # one in closed form
    task._flow.to = lambda device: drawn_to_level
    target = task._target(exact, t, x, cond, step)
    wanted = exact(t, x, cond.replace(step=step))
    is_long = step > 0.25
    torch.testing.assert_close(target[is_long], wanted[is_long], rtol=0, atol=1e-5)
    midpoint = 1 - 2 * step[~is_long] / 2 + (2 * step[~is_long] / 2) ** 2 / 2
    goal = column(cond.level[:, 1])[~is_long]
    ends = goal + (x[~is_long] - goal) * column(midpoint) ** 2
    torch.testing.assert_close(target[~is_long], (ends - x[~is_long]) / column(step)[~is_long], rtol=0, atol=1e-4)


def made(run, *keys):
    bridge = Bridge.load(run, keys)
    return bridge.translate(bridge.patches().centre([0, 1]), ids=["a", "b"])


def test_a_run_takes_its_shortcuts(run):
    few, plain = made(run, *FEW), made(run, *MANY, "translate.steps=2", "translate.solver=euler")
    assert "+shortcut@3:" in few.header.config_hash
    assert "shortcut" not in plain.header.config_hash
    assert few.nfe == plain.nfe == (6, 6)
    assert (few.frames[1:] != plain.frames[1:]).any()
    assert "+shortcut@3:" in Bridge.load(run, FEW).identity()
    for key, message in (
        ("translate.guidance_scale=2.0", "guidance needs the velocity at one moment"),
        ("translate.guidance.form=endpoint", "guidance needs the velocity at one moment"),
        ("translate.steps=3", "takes 1, 2, 4 steps here"),
        ("translate.method=path", "has no part in translate.method=path"),
        ("shortcut.steps=0", "has no trained shortcuts. Train them: .* shortcut.steps=4"),
    ):
        with pytest.raises(UserError, match=f"translate.solver=shortcut: .*{message}"):
            made(run, *FEW, key)
    with pytest.raises(
        UserError, match=r"trained otherwise and cannot be used with shortcut.steps \(4 there, 2 here\)"
    ):
        made(run, *FEW, "shortcut.steps=2")


def test_shortcuts_of_an_earlier_flow_are_refused(run):
    with pytest.raises(SystemExit, match=r"train.steps=6: .* has shortcuts of the flow as it is, after 4 updates"):
        cli.main(["train", str(run), "train.steps=6"])
    cli.main(["train", str(run), "shortcut.steps=0", "train.steps=6"])
    with pytest.raises(SystemExit, match="learned from another state of its flow"):
        cli.main(["train", str(run), *SHORT])
    with pytest.raises(UserError, match="learned from another state of its flow"):
        made(run, "shortcut.steps=4", *FEW)
    made(run, "shortcut.steps=4", *MANY)  # all else goes on


def test_the_coarse_progression_of_a_source_takes_no_step_that_none_was_trained_for():
    asked = []

    class One(Exact):
        steps = 1

        def __call__(self, num):
            asked.append(num)
            return super().__call__(num)

    class Meter:
        def see(self, states):
            seen = states.mean((2, 3, 4))
            return seen.sigmoid().numpy(), states.flatten(2).numpy()

    method = Progression(steps=1, solver="shortcut", calibrate="distance", calibrate_each=True)
    one = type(flow())(**{**vars(flow()), "shortcut": One()})
    method.carry(one, sources(), noise=noise_of(), levels=LEVELS, meter=Meter())
    assert set(asked) == {1}


def test_a_mistake_is_told_by_its_own_key(file):
    with pytest.raises(SystemExit, match=r"shortcut\.train\.batch_size=4096"):
        cli.main(["train", str(file), *BY_LEVEL, *SHORT, "shortcut.train.batch_size=4096"])


def test_a_path_that_does_not_begin_at_zero_has_none(file):
    config = load_config(file, [*BY_LEVEL, *SHORT, "path.name=brownian", "data.classes=[A, B]"])
    with pytest.raises(UserError, match="path brownian begins at"):
        build_shortcut(config)
