"""Finding nuclei as a training task: label maps in, a network of fields out."""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cellflux_bridge.base.seeds import derive_seed, numpy_generator, torch_generator
from cellflux_bridge.cellularity import artefacts
from cellflux_bridge.cellularity.augmentation import recolour
from cellflux_bridge.cellularity.fields import fields_of
from cellflux_bridge.cellularity.finding import find_nuclei
from cellflux_bridge.cellularity.label_maps import read_label_map
from cellflux_bridge.cellularity.label_sets import Crop, LabelledImages
from cellflux_bridge.cellularity.network import (
    DEPTH,
    DIAMETER,
    DIAMETER_UNIT,
    FOREGROUND,
    OFFSET,
    OFFSET_UNIT,
    NucleiNet,
    read_weights,
    require_fit,
    weights_file,
)
from cellflux_bridge.cellularity.parameters import Scale
from cellflux_bridge.cellularity.settings import NucleiConfig
from cellflux_bridge.cellularity.validation import compare, score
from cellflux_bridge.data.phantom import make_phantom
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.images import read_rgb

# Nuclear diameters, in px, of what is drawn.
_DRAWN = (5.0, 28.0)
_EMPTY_SHARE = 0.05


class NucleiBatch(NamedTuple):
    """RGB (B, 3, H, W) float32 in [0, 1], fields (B, 5, H, W), and where single nuclei are known (B, 1, 1, 1) bool."""

    rgb: torch.Tensor
    fields: torch.Tensor
    is_known: torch.Tensor


class NucleiTask:
    """Regression of the fields of label maps, on crops of all sets by their weights.

    Raises UserError for a set that cannot be read, and weights that do not fit the network.
    """

    def __init__(self, config: NucleiConfig):
        self._config, self.preprocessing = config, Preprocessing(config.crop)
        self._sets = [LabelledImages(one) for one in config.sets]
        self._validation = [LabelledImages(one) for one in config.validation]
        sources = [partial(one.crop, size=config.crop) for one in self._sets]
        self._sources = [*sources, self._phantom, self._drawn]
        weights = np.array([*(one.weight for one in config.sets), config.phantoms, config.drawn])
        self._shares = weights / weights.sum()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "nuclei", "weights"))
            self.model = NucleiNet(config.network.widths)
        if (start := config.network.init_from) is not None:
            model = "" if start == "built-in" else start
            weights = read_weights(model)
            require_fit(weights, self.model.state_dict(), file=weights_file(model))
            self.model.load_state_dict(weights)

    def _phantom(self, rng: np.random.Generator, *, scale: float) -> Crop:
        diameter = np.exp(rng.uniform(*np.log(_DRAWN)))
        phantom = make_phantom(
            rng.random(), size=self._config.crop, seed=int(rng.integers(2**31)), nucleus_diameter=diameter
        )
        diameters = np.append(0, 2 * np.sqrt(phantom.areas / np.pi))
        return Crop(phantom.image.astype(np.float32) / 255, phantom.labels.astype(np.int64), diameters)

    def _drawn(self, rng: np.random.Generator, *, scale: float) -> Crop:
        diameter = np.exp(rng.uniform(*np.log(_DRAWN)))
        return artefacts.drawn_field(rng, self._config.crop, diameter)

    def _draw(self, *purpose: str | int) -> tuple[Crop, np.random.Generator]:
        rng, of = numpy_generator(self._config.seed, "nuclei", *purpose), self._config.augmentation
        low, high = np.log(of.scale)
        scale = np.exp(low if low == high else rng.triangular(low, (low + high) / 2, high))
        if rng.random() < _EMPTY_SHARE:
            rgb = artefacts.empty_field(rng, self._config.crop, 16 * scale)
            crop = Crop(rgb, np.zeros(rgb.shape[:2], np.int64), np.zeros(1))
        else:
            crop = self._sources[rng.choice(len(self._sources), p=self._shares)](rng, scale=scale)
        if rng.random() < of.artefacts:
            crop = artefacts.paint(rng, crop, diameter=16 * scale)
        return crop, rng

    def batch(self, index: int, *, rank: int) -> NucleiBatch:
        num, of = self._config.train.batch_size, self._config.augmentation
        drawn = [self._draw(index, rank, number) for number in range(num)]
        rgb = torch.from_numpy(np.stack([crop.rgb for crop, _ in drawn])).permute(0, 3, 1, 2)
        generator = torch_generator(self._config.seed, "nuclei stain", index, rank)
        rgb = recolour(rgb, [rng for _, rng in drawn], strength=of.stain, generator=generator)
        fields = np.stack([fields_of(crop.labels, crop.diameters) for crop, _ in drawn])
        is_known = torch.tensor([not crop.is_foreground for crop, _ in drawn]).view(-1, 1, 1, 1)
        return NucleiBatch(rgb, torch.from_numpy(fields), is_known)

    def loss(self, model: nn.Module, batch: NucleiBatch) -> torch.Tensor:
        """Cross-entropy and Dice of the foreground; squared error of the depth; absolute error of the offset, over the
        nucleus's radius, and of the diameter's logarithm, on nuclear pixels."""
        found, truth = model(1 - batch.rgb).float(), batch.fields
        inside = truth[:, FOREGROUND : FOREGROUND + 1]
        logit = found[:, FOREGROUND : FOREGROUND + 1]
        share = torch.sigmoid(logit)
        dice = 1 - (2 * (share * inside).sum() + 1) / (share.sum() + inside.sum() + 1)
        loss = F.binary_cross_entropy_with_logits(logit, inside) + 0.3 * dice
        known = batch.is_known.float()
        nuclear = inside * known
        num = nuclear.sum().clamp_min(1)
        depth = (found[:, DEPTH] - truth[:, DEPTH]).square() * known[:, 0]
        size = truth[:, DIAMETER : DIAMETER + 1]
        radius = DIAMETER_UNIT / 2 * 2**size / OFFSET_UNIT
        offset = (found[:, OFFSET] - truth[:, OFFSET]).abs().sum(1, keepdim=True) / radius
        wrong_size = (found[:, DIAMETER : DIAMETER + 1] - size).abs()
        return loss + 4 * depth.mean() + ((0.5 * offset + 0.3 * wrong_size) * nuclear).sum() / num

    @torch.no_grad()
    def validate(self, model: NucleiNet, device: torch.device) -> dict[str, float]:
        """On the validation images, at their own scale: F1 at an intersection over union of a half, and the median
        relative error of their counts."""
        compared = []
        for of in self._validation:
            for image, label_map in of.pairs:
                rgb = read_rgb(image)
                truth, _ = read_label_map(label_map, rgb.shape[:2])
                found = find_nuclei(rgb[None], Scale(of.settings.scale), model.eval())[0]
                compared.append(compare(truth, found))
        if not compared:
            return {}
        scores = score(compared)
        values = {"val/f1": scores.f1, "val/count_error": scores.count_error_median}
        return {name: value for name, value in values.items() if np.isfinite(value)}

    def sheet(self, model: NucleiNet, device: torch.device) -> None:
        return None
