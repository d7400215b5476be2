"""What a flow is made of: its codec, its path, its velocity network and the network's condition."""

import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.codec.base import build_codec
from cellflux_bridge.condition.base import Condition, ConditionSpec, Names, Part
from cellflux_bridge.config import Config, registry
from cellflux_bridge.path.base import Path
from cellflux_bridge.velocity.base import Velocity

# The sections of a configuration on which a flow depends, besides that of its training.
FLOW_SECTIONS = ("seed", "data", "pairs", "coupling", "path", "condition", "codec", "velocity", "perceptual")


def condition_spec(config: Config, *, channels: int) -> ConditionSpec:
    """The parts of a network's condition; `channels` are those of a state. UserError for a configuration
    without classes, on which the network's size depends."""
    if not config.data.classes:
        raise UserError("data.classes: none named; a trained network's configuration names its classes")
    data = config.data
    names = Names(tuple(data.classes), tuple(data.batches or ()), data.root.expanduser())
    return ConditionSpec(tuple(registry.build("part", part, names, channels) for part in config.condition.all_parts()))


def build_flow(config: Config, *more: Part) -> tuple[Path, Velocity]:
    """The path and the (untrained) velocity network of a resolved configuration, with `more` parts of its condition.

    Raises UserError where they do not fit each other: the clean source as network input needs noise on every sample,
    because from a point mass at x0 the velocity at t = 0 is E[x1 | x0] - x0, a blurred mean.
    """
    path, codec = registry.build("path", config.path), build_codec(config)
    if config.condition.source_image and not path.noise_on_every_sample:
        raise UserError(
            f"condition.source_image: path {config.path['name']} does not lay noise on every sample of a source; use "
            "noised_source with probability 1, or brownian"
        )
    spec = ConditionSpec((*condition_spec(config, channels=codec.channels).parts, *more))
    network = registry.build("velocity", config.velocity, codec.channels, spec)
    if config.data.image_size % (stride := codec.stride * network.stride):
        raise UserError(
            f"data.image_size={config.data.image_size}: not divisible by the network's stride {stride} "
            f"({config.velocity['name']}); choose a multiple, or a smaller velocity.patch or fewer velocity.multipliers"
        )
    return path, network


def make_condition(
    spec: ConditionSpec,
    *,
    x0: torch.Tensor,
    target_label: torch.Tensor,
    source_class: int,
    batch: torch.Tensor | None = None,
    dose: torch.Tensor | None = None,
) -> Condition:
    """The condition of source states x0 (B, C, H, W) of a class, which are to become soft labels (B, num_classes) at
    doses (B,), 0 for none, and belong to batches (B,), -1 where not known. `spec` is the network's own.
    """
    target_class = target_label.argmax(1)
    return spec.read(
        {
            "x0": x0,
            "target_level": target_label,
            "target_class": target_class,
            "source_class": torch.full_like(target_class, source_class),
            "batch": torch.full_like(target_class, -1) if batch is None else batch,
            "dose": torch.zeros_like(target_label[:, 0]) if dose is None else dose,
        }
    )
