"""DDIM stairs: one inversion of each source, read at K depths, decoded in full from each.

This is Cellflow's method: z_1, z_2, .. encode the source image under its class without a guide; the state at depth d_m
is decoded under the target class, guided in every step, and becomes frame m. Only the depth differs between frames.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from cellflux_bridge.ddim import steps
from cellflux_bridge.ddim.depths import fourier_depths, low_frequency_magnitudes, require_depths
from cellflux_bridge.ddim.schedule import Schedule
from cellflux_bridge.ddim.steps import Classifier, NoisePredictor

# From the encoded states (T, B, C, H, W) to the depths (B, K) of every image.
DepthRule = Callable[[torch.Tensor], torch.Tensor]
# A rule sees all states of as many images at a time as fit into these bytes (of one image at least).
_STATES_BYTES = 2**29


class Stairs(NamedTuple):
    """frames (K+1, B, C, H, W) float, frame 0 the source; depths (B, K); and what each image took, (B,) int64."""

    frames: torch.Tensor
    depths: torch.Tensor
    forwards: torch.Tensor
    gradients: torch.Tensor


def fourier_rule(num: int, *, mirrored: bool) -> DepthRule:
    """The rule `fourier` (`mirrored`, as released) or `fourier_unmirrored`, for every image by itself."""

    def rule(states: torch.Tensor) -> torch.Tensor:
        magnitudes = np.stack([low_frequency_magnitudes(z) for z in states], axis=1)
        return torch.tensor([fourier_depths(row.tolist(), num, mirrored=mirrored) for row in magnitudes])

    return rule


@torch.no_grad()
def ddim_stairs(
    x0: torch.Tensor,
    y_source: torch.Tensor,
    y_target: torch.Tensor,
    *,
    schedule: Schedule,
    encoder: NoisePredictor,
    decoder: NoisePredictor,
    depths: torch.Tensor | DepthRule,
    classifier: Classifier | None = None,
    scale: float = 0.0,
    batch_size: int = 64,
    report: Callable[[int], None] = lambda num: None,
) -> Stairs:
    """Stairs from sources x0 (B, C, H, W) in [-1, 1] of classes y_source (B,) to y_target (B,).

    `depths` are (K,) for all images or (B, K), rising in 1..T, or a rule that finds them on the encoded states. A
    network call holds at most `batch_size` images or levels of images; `report` hears of every call how many. The
    result of an image does not depend on the others. Memory holds B x K states, and with a rule 512 MiB of others.

    With depths 10, 20, .., 90, 99 an image takes 99 + 549 = 648 forwards and 549 classifier gradients. A rule takes T
    forwards to encode. Departs: the release encodes again after the rule, 100 forwards more.
    """
    timesteps, num_images = len(schedule), len(x0)
    run = _Run(schedule, batch_size, report)
    if callable(depths):
        room = max(1, _STATES_BYTES // (timesteps * x0[0].numel() * x0.element_size()))
        parts = zip(x0.split(room), y_source.split(room), strict=True)
        latents, found = zip(*(run.encode_by(depths, x, y, encoder) for x, y in parts), strict=True)
        latents, depths = torch.cat(latents, dim=1), torch.cat(found)
        num_encoded = torch.full((num_images,), timesteps)
    else:
        depths = depths.expand(num_images, -1).cpu()
        for row in depths.tolist():
            require_depths(row, timesteps)
        num_encoded = depths.amax(1)
        latents = x0.new_empty(depths.shape[1], *x0.shape)
        for depth, z in enumerate(run.encode(x0, y_source, encoder, num_encoded), start=1):
            places, images = (depths.T == depth).nonzero(as_tuple=True)
            latents[places, images] = z[images]
    guide = classifier if scale else None
    rows, targets = latents.flatten(0, 1), y_target.repeat(len(latents))
    frames = run.decode(rows, targets, decoder, depths.T.flatten(), guide, scale).view_as(latents)
    decoded = depths.sum(1)
    forwards = num_encoded * encoder.forwards + decoded * decoder.forwards
    return Stairs(torch.cat([x0[None], frames]), depths, forwards, decoded * (guide is not None))


class _Run(NamedTuple):
    schedule: Schedule
    batch_size: int
    report: Callable[[int], None]

    def encode(self, z: torch.Tensor, y: torch.Tensor, eps: NoisePredictor, depths: torch.Tensor):
        """z_1, z_2, .. of all images; one that has come to its depth stays as it is."""
        z = z.clone()
        for k in range(int(depths.max())):
            for rows, tau in self._chunks(k, depths, z.device):
                z[rows] = steps.encode_step(z[rows], eps(z[rows], tau, y[rows]).to(z.dtype), k, self.schedule)
            yield z.clone()

    def encode_by(self, rule: DepthRule, x0: torch.Tensor, y: torch.Tensor, eps: NoisePredictor):
        """The states (K, B, C, H, W) of images at the depths (B, K) that a rule finds for them, and these depths."""
        states = x0.new_empty(len(self.schedule), *x0.shape)
        for k, z in enumerate(self.encode(x0, y, eps, torch.full((len(x0),), len(states)))):
            states[k] = z
        depths = rule(states)
        return states[depths.T - 1, torch.arange(len(x0))], depths

    def decode(self, u, y, eps: NoisePredictor, depths, classifier: Classifier | None, scale: float) -> torch.Tensor:
        """Rows u decoded to the end, each from its own depth: it joins when the others have come down to it."""
        u = u.clone()
        for k in reversed(range(int(depths.max()))):
            for rows, tau in self._chunks(k, depths, u.device):
                state = u[rows]
                noise = eps(state, tau, y[rows]).to(u.dtype)
                if classifier is not None:
                    gradient = steps.classifier_gradient(classifier, state, tau, y[rows]).to(u.dtype)
                    noise = steps.guided_eps(noise, gradient, k, self.schedule, scale=scale)
                u[rows] = steps.decode_step(state, noise, k, self.schedule)
        return u

    def _chunks(self, k: int, depths: torch.Tensor, device: torch.device):
        """The rows that take part in step k, and their tau, in parts that one network call holds."""
        for rows in (depths > k).nonzero()[:, 0].split(self.batch_size):
            yield rows, torch.full((len(rows),), int(self.schedule.tau[k]), device=device)
            self.report(len(rows))
