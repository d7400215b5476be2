"""Velocity networks: shapes, what they are told, and that samples of a batch do not see each other."""

import pytest
import torch
from torch import nn

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition, ConditionSpec, Names, Part
from cellflux_bridge.condition.level import Level
from cellflux_bridge.condition.source_class import SourceClass
from cellflux_bridge.condition.source_image import SourceImage
from cellflux_bridge.condition.target_class import TargetClass
from cellflux_bridge.config import registry
from cellflux_bridge.transport.integrate import integrate
from cellflux_bridge.velocity.adm import ADM
from cellflux_bridge.velocity.base import _BOUNDS, as_velocity, sinusoidal
from cellflux_bridge.velocity.dit import DiT
from cellflux_bridge.velocity.unet import UNet

CLASSES = 3
NAMES = Names(("A", "B", "C"))


def spec_of(
    *, target: str = "class", source_class: bool = True, source_image: bool = False, channels: int = 3, more=()
):
    """The spec of a network that is told these parts, and the `more` classes of parts."""
    used = {
        TargetClass: target == "class",
        Level: target == "level",
        SourceClass: source_class,
        SourceImage: source_image,
    }
    parts = (part for part, is_used in used.items() if is_used)
    return ConditionSpec(tuple(part(NAMES, channels) for part in (*parts, *more)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_unet(spec: ConditionSpec, *, image_channels: int = 3, **options) -> UNet:
    settings = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (1,), "head_channels": 4, **options}
    return UNet(image_channels, spec, **settings)


def make_adm(spec: ConditionSpec, *, image_channels: int = 3, **options) -> ADM:
    settings = {"channels": 32, "multipliers": (1, 1), "blocks": 1, "attention": (1,), "head_channels": 16, **options}
    return ADM(image_channels, spec, **settings)


def make_dit(spec: ConditionSpec, *, image_channels: int = 3, **options) -> DiT:
    return DiT(image_channels, spec, **{"width": 16, "depth": 2, "heads": 2, "patch": 4, **options})


MAKERS = {"unet": make_unet, "adm": make_adm, "dit": make_dit}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def test_every_network_is_tested():
    assert set(MAKERS) == set(registry.names("velocity"))


def perturbed(network: nn.Module) -> nn.Module:
    """The network with random weights where its initialisation has zeros, in evaluation mode."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator(parameter.numel()))
    return network.eval()


def soft_labels(num: int) -> torch.Tensor:
    """Mixtures of all classes, (num, CLASSES)."""
    return torch.rand(num, CLASSES, generator=generator(2)).log_softmax(1).exp()


def inputs(num: int = 4, *, channels: int = 3, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    draw = generator(1)
    t, x = torch.rand(num, generator=draw), torch.randn(num, channels, size, size, generator=draw)
    cond = Condition(
        target_class=torch.arange(num) % CLASSES,
        level=soft_labels(num),
        source_class=(torch.arange(num) + 1) % CLASSES,
        source_image=torch.randn(num, channels, size, size, generator=draw),
    )
    return t, x, cond


def changed(cond: Condition, **values) -> Condition:
    return cond.replace(**values)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 8), (12, 12)])
def test_output_has_the_shape_of_the_state(make, channels, height, width):
    network = make(spec_of(), image_channels=channels)
    t, _, cond = inputs(2, channels=channels)
    x = torch.randn(2, channels, height, width, generator=generator())
    assert network(t, x, cond).shape == x.shape


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_fold_and_unfold(patch):
    network = make_unet(spec_of(source_image=True), patch=patch)
    t, x, cond = inputs(size=16)
    assert network.stride == 2 * patch
    assert perturbed(network)(t, x, cond).shape == x.shape


@pytest.mark.parametrize("make", [make_unet, make_adm])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2)])
def test_stride_is_the_least_size_that_goes_through(make, multipliers):
    network = make(spec_of(), multipliers=multipliers, attention=())
    assert network.stride == 2 ** (len(multipliers) - 1)
    t, x, cond = inputs(2, size=network.stride)
    assert network(t, x, cond).shape == x.shape


def test_the_untrained_output_is_zero(make):
    t, x, cond = inputs()
    assert torch.equal(make(spec_of(), predict="velocity").eval()(t, x, cond), torch.zeros_like(x))
    bound = _BOUNDS["endpoint"]
    t = torch.tensor([0.0, 0.5, 1 - bound / 2, 1.0])
    toward_grey = -x / torch.tensor([1.0, 0.5, bound, bound]).view(-1, 1, 1, 1)
    torch.testing.assert_close(make(spec_of(), predict="endpoint").eval()(t, x, cond), toward_grey)


def test_a_predicted_endpoint_gives_the_velocity_of_the_straight_path():
    x0, x1 = torch.randn(2, 4, 3, 8, 8, generator=generator(), dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 0.5, 1 - _BOUNDS["endpoint"]], dtype=torch.float64)
    x_t = torch.lerp(x0, x1, t.view(-1, 1, 1, 1))
    torch.testing.assert_close(as_velocity(x1, t, x_t, predict="endpoint"), x1 - x0)
    assert as_velocity(x1, t, x_t, predict="velocity") is x1


def test_the_last_step_leaves_no_noise_where_the_endpoint_is_predicted():
    start, clean = torch.randn(2, 4, 3, 8, 8, generator=generator())
    found = integrate(lambda t, x, cond: as_velocity(clean, t, x, predict="endpoint"), start, None, steps=6)
    torch.testing.assert_close(found.states[-1], clean, atol=1e-5, rtol=0)


def test_the_end_of_the_way_weighs_as_if_a_fifth_remained(make):
    t = torch.tensor([0.0, 0.5, 0.8, 0.9, 1.0])
    weight = make(spec_of(), predict="endpoint").error_weight(t)
    torch.testing.assert_close(weight, torch.tensor([1.0, 1.0, 1.0, 0.25, 0.0]), atol=1e-6, rtol=1e-5)
    assert torch.equal(make(spec_of(), predict="velocity").error_weight(t), torch.ones(5))


@pytest.mark.parametrize("target", ["class", "level"])
def test_time_state_and_condition_matter(make, target):
    # The output itself: the velocity of a predicted endpoint depends on time and state by its definition.
    network = perturbed(make(spec_of(target=target, source_class=True, source_image=True), predict="velocity"))
    t, x, cond = inputs()
    v = network(t, x, cond)
    told = (
        {"target_class": (cond.target_class + 1) % CLASSES} if target == "class" else {"level": cond.level.roll(1, 1)}
    )
    assert not same(v, network(t + 0.3, x, cond))
    assert not same(v, network(t, x + 1, cond))
    assert not same(v, network(t, x, changed(cond, **told)))
    assert not same(v, network(t, x, changed(cond, source_class=(cond.source_class + 1) % CLASSES)))
    assert not same(v, network(t, x, changed(cond, source_image=cond.source_image + 1)))
    unused = {"level": cond.level.flip(1)} if target == "class" else {"target_class": cond.source_class}
    assert torch.equal(v, network(t, x, changed(cond, **unused)))


def test_what_the_spec_leaves_out_is_not_needed(make):
    network = perturbed(make(spec_of(source_class=False)))
    t, x, cond = inputs()
    full = network(t, x, cond)
    assert torch.equal(full, network(t, x, Condition(target_class=cond.target_class)))


@pytest.mark.parametrize("target", ["class", "level"])
def test_dropped_samples_ignore_all_but_the_source_image(make, target):
    network = perturbed(make(spec_of(target=target, source_image=True)))
    t, x, cond = inputs()
    other = changed(cond, target_class=cond.source_class, level=cond.level.flip(1), source_class=cond.target_class)
    mask = torch.tensor([True, False, True, False])
    v, w = network(t, x, cond.drop(mask)), network(t, x, other.drop(mask))
    assert same(v[mask], w[mask])
    assert not same(v[~mask], w[~mask])
    assert same(v[mask], network(t, x, cond.null())[mask])
    moved = network(t, x, changed(cond, source_image=cond.source_image + 1).drop(mask))
    assert all(not same(v[i], moved[i]) for i in range(4))


def test_the_null_is_learned(make):
    network = make(spec_of())
    t, x, cond = inputs()
    perturbed(network).train()(t, x, cond.drop(torch.tensor([True, False, False, False]))).square().sum().backward()
    assert network.condition.null.grad.abs().sum() > 0


def test_a_sample_does_not_depend_on_its_batch(make):
    network = perturbed(make(spec_of(source_image=True)))
    t, x, cond = inputs(6)
    cond = cond.drop(torch.tensor([False, True, False, False, True, False]))
    together = network(t, x, cond)
    for i in range(6):
        alone = cond.index(slice(i, i + 1))
        torch.testing.assert_close(
            network(t[i : i + 1], x[i : i + 1], alone), together[i : i + 1], rtol=1e-4, atol=1e-5
        )


def test_levels_between_those_trained_give_velocities_between():
    network = perturbed(make_unet(spec_of(target="level")))
    t, x, cond = (v[:1] if isinstance(v, torch.Tensor) else v for v in inputs())
    c = torch.linspace(0, 1, 101)
    many = Condition(
        level=torch.stack([1 - c, torch.zeros(101), c], dim=1), source_class=cond.source_class[:1].expand(101)
    )
    with torch.no_grad():
        v = network(t.expand(101), x.expand(101, -1, -1, -1), many).flatten(1)
    steps = (v[1:] - v[:-1]).norm(dim=1)
    assert steps.max() < 0.1 * (v[-1] - v[0]).norm()  # no jump between neighbouring levels


@pytest.mark.parametrize("make", [make_unet, make_adm])
@pytest.mark.parametrize("attention", [(2,), (-1,), (0, 5)])
def test_attention_outside_the_levels_is_refused(make, attention):
    with pytest.raises(UserError, match=r"velocity\.attention.*outside 0\.\.1"):
        make(spec_of(), attention=attention)


def test_adm_refuses_channels_that_its_groups_cannot_share():
    with pytest.raises(UserError, match=r"velocity\.channels: 48"):
        make_adm(spec_of(), channels=48)


@pytest.mark.parametrize("patch", [1, 2, 8])
def test_the_patch_of_a_transformer_is_its_stride(patch):
    network = make_dit(spec_of(source_image=True), patch=patch)
    assert network.stride == patch
    t, x, cond = inputs(2)
    assert network(t, x, cond).shape == x.shape


def test_a_transformer_refuses_heads_that_do_not_divide_its_width():
    with pytest.raises(UserError, match=r"velocity\.heads: 3 does not divide velocity\.width=16"):
        make_dit(spec_of(), heads=3)


def test_a_transformer_knows_rows_and_columns_and_puts_patches_back_where_they_were():
    network = perturbed(make_dit(spec_of(), predict="velocity"))
    t, x, cond = inputs(1, size=16)
    v = network(t, torch.zeros_like(x), cond)
    patches = v.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)[0]
    assert (torch.pdist(patches.flatten(0, 1)) > 1e-3).all()  # of equal patches, so by their positions alone
    moved = x.clone()
    moved[:, :, 4:8, 8:12] += 1
    difference = (network(t, moved, cond) - network(t, x, cond)).abs()
    change = torch.nn.functional.avg_pool2d(difference, 4).mean((0, 1))
    assert change.argmax() == 1 * 4 + 2


def test_a_transformers_blocks_are_the_identity_before_training():
    network = make_dit(spec_of())
    h, embedding = torch.randn(4, 5, 16, generator=generator()), torch.randn(4, 16, generator=generator(1))
    assert all(torch.equal(block(h, embedding), h) for block in network.blocks)
    perturbed(network)
    assert all(not same(block(h, embedding), h) for block in network.blocks)


def test_every_modulation_of_a_transformer_has_a_use():
    network = perturbed(make_dit(spec_of()))
    network(*inputs()).square().sum().backward()
    assert all((layer.modulation.bias.grad != 0).all() for layer in (*network.blocks, network))


def test_a_transformer_is_dit_s_that_predicts_the_end_by_default():
    published = {"width": 384, "depth": 12, "heads": 6, "mlp_ratio": 4.0, "dropout": 0.0}
    found = registry.validate("velocity", "dit", key="velocity")
    assert found == {"name": "dit", **published, "patch": 8, "predict": "endpoint"}


def test_gradients_reach_every_weight_once_the_zeros_are_left(make):
    network = perturbed(make(spec_of(target="level", source_image=True)))
    t, x, cond = inputs()
    network(t, x, cond.drop(torch.tensor([True, False, False, False]))).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_network_is_built_without_memory_and_runs_there(make):
    with torch.device("meta"):
        network = make(spec_of())
        t, x, cond = (v.to(torch.device("meta")) for v in inputs())
        assert network(t, x, cond).shape == x.shape
    assert all(p.is_meta for p in network.parameters())


def test_a_network_learns_what_its_condition_decides(make):
    torch.manual_seed(0)
    network = make(spec_of(source_class=False), predict="velocity")
    t, x, cond = inputs(12)
    ramp = torch.linspace(-1, 1, 8).view(1, 1, 1, 8)
    wanted = (cond.target_class.view(-1, 1, 1, 1) - 1) * ramp + 0 * x
    optimiser, losses = torch.optim.Adam(network.parameters(), lr=5e-3), []
    for _ in range(60):
        loss = (network(t, x, cond) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    moved = network(t, x, changed(cond, target_class=(cond.target_class + 1) % CLASSES))
    assert not same(moved, network(t, x, cond))


def test_conditions_join_along_the_batch():
    *_, first = inputs(2)
    *_, second = inputs(3)
    joined = Condition.cat([first, second])
    assert len(joined) == 5
    assert joined.dropped is None
    assert torch.equal(joined.target_class, torch.cat([first.target_class, second.target_class]))
    assert torch.equal(joined.source_image[2:], second.source_image)
    partly = Condition.cat([first, second.drop(torch.tensor([True, False, True]))])
    assert partly.dropped.tolist() == [False, False, True, False, True]
    assert Condition.cat([Condition(level=torch.eye(2)), Condition(level=torch.eye(2)[:1])]).target_class is None


def test_dropping_adds_up_and_null_drops_all():
    *_, cond = inputs(3)
    once = cond.drop(torch.tensor([True, False, False]))
    assert once.drop(torch.tensor([False, False, True])).dropped.tolist() == [True, False, True]
    assert once.null().dropped.tolist() == [True, True, True]
    assert cond.dropped is None
    assert Condition(level=torch.eye(3)[:2]).null().dropped.tolist() == [True, True]


def test_a_condition_moves_with_all_its_fields():
    *_, cond = inputs(2)
    moved = cond.null().to(torch.device("meta"))
    assert moved.dropped.is_meta
    assert all(tensor.is_meta for tensor in moved.tensors.values())


def test_sinusoids_tell_times_apart():
    embedded = sinusoidal(torch.linspace(0, 1, 200), 16)
    assert embedded.shape == (200, 16)
    assert (torch.pdist(embedded) > 1e-2).all()


# Parts of a condition


class Darkness(Part):
    """A number of the source that some samples lack: the mean of x0, where it is below 0."""

    name, optional = "darkness", True

    def read(self, fields):
        return fields["x0"].mean((1, 2, 3))[:, None]

    def is_present(self, fields):
        return self.read(fields)[:, 0] < 0

    def embedding(self, width):
        return nn.Linear(1, width)


class Corners(Part):
    """The four corners of the source as tokens."""

    name, form = "corners", "tokens"

    def read(self, fields):
        return fields["x0"][:, :, :: fields["x0"].shape[2] - 1, :: fields["x0"].shape[3] - 1].flatten(2).transpose(1, 2)

    def embedding(self, width):
        return nn.Linear(self.channels, width)


class Mask(Part):
    """Where the source is dark, beside the state; unlike the source itself it is dropped."""

    name, form = "mask", "map"

    def read(self, fields):
        return (fields["x0"] < 0).float()

    def embedding(self, width):
        return nn.Identity()


FIELDS = {"x0": torch.randn(4, 3, 8, 8, generator=generator(5)), "target_class": torch.tensor([0, 1, 2, 0])}


def told(spec: ConditionSpec, **fields) -> Condition:
    return spec.read({**FIELDS, "source_class": FIELDS["target_class"].flip(0), **fields})


def test_an_absent_part_is_neither_empty_nor_a_dropped_condition():
    spec = spec_of(source_class=False, more=(Darkness,))
    network, x0 = perturbed(make_unet(spec)), FIELDS["x0"] - FIELDS["x0"].mean((1, 2, 3), keepdim=True)
    shift = torch.tensor([-0.5, 0.5, -0.5, 0.7]).view(-1, 1, 1, 1)
    cond, t, x = told(spec, x0=x0 + shift), torch.full((4,), 0.5), FIELDS["x0"]
    assert cond.present["darkness"].tolist() == [True, False, True, False]
    v, other = network(t, x, cond), network(t, x, cond.replace(darkness=cond.darkness - 1))
    lacking = torch.tensor([1, 3])
    assert same(v[lacking], other[lacking])  # what stands in the place of an absent part is not read
    assert not same(v[0], other[0])
    empty = Condition(target_class=cond.target_class, darkness=torch.zeros(4, 1))
    assert not same(v[1], network(t, x, empty)[1])
    assert not same(v[1], network(t, x, cond.null())[1])
    assert torch.equal(cond.index([1, 3]).present["darkness"], torch.tensor([False, False]))
    joined = Condition.cat([cond, empty])
    assert joined.present["darkness"].tolist() == [True, False, True, False, True, True, True, True]
    torch.testing.assert_close(network(t.repeat(2), x.repeat(2, 1, 1, 1), joined)[:4], v)


@pytest.mark.parametrize("make", [make_unet, make_dit])
@pytest.mark.parametrize("part", [Corners, Mask])
def test_tokens_are_attended_to_and_maps_laid_beside_and_both_are_dropped(make, part):
    torch.manual_seed(0)
    spec = spec_of(more=(part,))
    network, t, x = perturbed(make(spec)), torch.full((4,), 0.5), FIELDS["x0"]
    cond, other = told(spec), told(spec, x0=-FIELDS["x0"])
    assert not same(network(t, x, cond), network(t, x, other))
    mask = torch.tensor([True, False, False, True])
    v, w = network(t, x, cond.drop(mask)), network(t, x, other.drop(mask))
    assert same(v[mask], w[mask])
    assert all(not same(v[i], w[i]) for i in (1, 2))
    network.train()(t, x, cond.drop(mask)).square().sum().backward()
    assert network.condition.nulls[part.name].grad.abs().sum() > 0


def test_a_transformers_output_is_of_its_patches_not_of_its_tokens():
    network = perturbed(make_dit(spec_of(more=(Corners,)), predict="velocity"))
    v = network(torch.full((4,), 0.5), FIELDS["x0"], told(network.spec, x0=torch.ones(4, 3, 8, 8)))  # equal tokens
    patches = v.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    assert all((torch.pdist(of_one) > 1e-3).all() for of_one in patches)


def test_a_network_refuses_parts_that_it_cannot_use():
    with pytest.raises(UserError, match=r"condition: part 'corners' gives tokens, this network takes vector, map"):
        make_adm(spec_of(more=(Corners,)))
    with pytest.raises(UserError, match=r"velocity\.attention: empty, but the condition has tokens"):
        make_unet(spec_of(more=(Corners,)), attention=())


def test_weights_keep_their_names_and_further_parts_add_their_own():
    names = make_unet(spec_of()).condition.state_dict().keys()
    assert list(names) == ["null", "target.weight", "source.weight"]
    more = make_unet(spec_of(more=(Darkness, Mask))).condition.state_dict().keys() - names
    assert more == {"darkness.weight", "darkness.bias", "nulls.darkness", "nulls.mask"}
