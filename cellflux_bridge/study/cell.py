"""One cell of a study: a classifier trained with an arm's images and augmentation, asked about held-out patches."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from cellflux_bridge import checkpoint, images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import replace_text, replacing
from cellflux_bridge.base.seeds import derive_seed, numpy_generator, torch_generator
from cellflux_bridge.classifier import inference
from cellflux_bridge.classifier.calibration import balanced_weights, fit_temperature, negative_log_likelihood
from cellflux_bridge.config import registry
from cellflux_bridge.data.balanced import BalancedPatches
from cellflux_bridge.data.patches import Patches, load_patches
from cellflux_bridge.images import stain
from cellflux_bridge.study.backbones import Backbone
from cellflux_bridge.study.leaks import require_trained_on
from cellflux_bridge.study.plan import (
    DONE,
    GUIDE,
    Cell,
    Making,
    cell_digest,
    cell_folder,
    directions,
    feature_key,
    generator_key,
    guide_key,
    made_folder,
    size_folder,
    sized,
)
from cellflux_bridge.study.pool import Pool, candidates, choose
from cellflux_bridge.study.results import result_of
from cellflux_bridge.study.settings import StudyConfig
from cellflux_bridge.training.loop import fit, make_fabric

_CHUNK = 256
# Of a frozen backbone: how many augmented patches its features are taken of; the head is trained on these.
_BANK = 4096


class Batch(NamedTuple):
    """x (B, 3, S, S) in [-1, 1], or features (B, D); soft labels y (B, num_classes)."""

    x: torch.Tensor
    y: torch.Tensor


class CellTask:
    """Cross-entropy on batches of real patches, every class alike, in which made images take their share.

    The same seed gives all arms the same initial weights and the same real patches, so that arms are compared in pairs.
    With a generator's images a row is replaced by one of them with probability ratio / (1 + ratio); then the arm's
    augmentation is laid over all rows.
    """

    def __init__(self, config: StudyConfig, patches: Patches, cell: Cell, train: np.ndarray, made: Pool | None):
        self.preprocessing, self._seed, self._config = patches.preprocessing, (config.seed, cell.seed), config
        self._patches, self._made, arm = patches, made, config.arms[cell.arm]
        self._share = arm.ratio / (1 + arm.ratio) if made is not None else 0.0
        self._real = BalancedPatches(patches, train, data=config.data)
        self._augment = None if arm.augmentation is None else registry.build("augmentation", arm.augmentation)
        self._num_classes = len(patches.classes)
        backbone = config.backbones[cell.backbone]
        with torch.random.fork_rng(devices=[]):
            seeds = (config.seed,) if backbone.frozen else self._seed  # a frozen one is the same for all seeds
            torch.manual_seed(derive_seed(*seeds, "study weights", cell.backbone))
            self.network = Backbone(backbone, self._num_classes, patch_size=patches.preprocessing.image_size)
        self.model: nn.Module = self.network.head if backbone.frozen else self.network
        self.is_frozen = backbone.frozen

    def batch(self, index: int, *, rank: int) -> Batch:
        if not self.is_frozen:
            return self._drawn(index, rank)
        start = (index * self._config.train.batch_size) % len(self._bank.x)
        rows = torch.arange(start, start + self._config.train.batch_size) % len(self._bank.x)
        return Batch(self._bank.x[rows], self._bank.y[rows])

    def _drawn(self, index: int, rank: int) -> Batch:
        def generator(purpose: str) -> torch.Generator:
            return torch_generator(*self._seed, f"study {purpose}", index, rank)

        num = self._config.train.batch_size
        x, labels, _ = self._real.draw(num, generator=generator("real"), jitter=generator("stain"))
        y = torch.eye(self._num_classes)[labels]
        if self._made is not None:
            draw = generator("made")
            is_made = torch.rand(num, generator=draw) < self._share
            which = torch.randint(len(self._made.patches), (num,), generator=draw)
            turns = torch.randint(8 if self._config.data.flips else 1, (num,), generator=draw).tolist()
            made = images.encode(self._made.patches[which])
            made = torch.stack([_turned(one, turn) for one, turn in zip(made, turns, strict=True)])
            if self._config.data.stain.mode == "augment":  # as real patches are
                made = stain.augment(made, strength=self._config.data.stain.strength, generator=draw)
            x = torch.where(is_made[:, None, None, None], made, x)
            y = torch.where(is_made[:, None], torch.from_numpy(self._made.labels)[which], y)
        return Batch(*(self._augment(x, y, generator=generator("augmentation")) if self._augment else (x, y)))

    @torch.no_grad()
    def fill_bank(self, device: torch.device) -> None:
        """Take a frozen backbone's features of augmented patches: its head sees the same ones again and again."""
        train, network = self._config.train, self.network.to(device).eval()
        drawn = [self._drawn(index, 0) for index in range(min(train.steps, -(-_BANK // train.batch_size)))]
        x = [network.features(batch.x.to(device)).float().cpu() for batch in drawn]
        self._bank = Batch(torch.cat(x), torch.cat([batch.y for batch in drawn]))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch.x), batch.y)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        return {}

    def sheet(self, model: nn.Module, device: torch.device) -> None:
        return None

    @torch.no_grad()
    def logits(self, head: nn.Module, indices: np.ndarray, device: torch.device, *, cache: Path | None) -> np.ndarray:
        """Logits (N, num_classes) of middle patches by the trained model; of a frozen backbone features are kept in a
        file, since they are the same for all cells."""
        if not self.is_frozen:
            return self._of_middle(head.to(device).eval(), indices, device)
        if not cache.exists():
            found = self._of_middle(self.network.to(device).eval().features, indices, device)
            cache.parent.mkdir(parents=True, exist_ok=True)
            with replacing(cache) as temporary, open(temporary, "wb") as file:
                np.save(file, found)
        features = torch.from_numpy(np.load(cache)).to(device)
        return head.to(device).eval()(features).cpu().numpy()

    def _of_middle(self, function: Callable, indices: np.ndarray, device: torch.device) -> np.ndarray:
        """`function` of middle patches, never more than a chunk of them in memory."""
        chunks = np.split(indices, range(_CHUNK, len(indices), _CHUNK))
        batches = (images.encode(self._patches.centre(chunk).to(device)) for chunk in chunks)
        return torch.cat([function(x).float().cpu() for x in batches]).numpy()


def _turned(image: torch.Tensor, turn: int) -> torch.Tensor:
    return torch.rot90(image if turn < 4 else image.flip(-1), turn % 4, dims=(-2, -1))


def made_folders(config: StudyConfig, cell: Cell, generator: str, patches: Patches) -> list[Path]:
    """Where a generator's images are for a cell's size; UserError where they are not whole, or of other settings."""
    if (folder := config.generators[generator].folder) is not None:
        return [folder]
    making = Making(cell.size, generator)
    made = made_folder(config, making)
    _require_made(made.parent, generator_key(config, making), f"generator {generator!r}")
    require_trained_on(made.parent, patches)
    return [made / str(number) for number in range(len(directions(config, making)))]


def _require_made(folder: Path, key: str, what: str) -> None:
    done = folder / DONE
    if not done.exists() or done.read_text(encoding="utf-8") != key:
        raise UserError(f"{folder}: {what} is not made, or with other settings; see error.txt there")


def _made(config: StudyConfig, patches: Patches, cell: Cell, train: np.ndarray, device: torch.device) -> Pool | None:
    arm = config.arms[cell.arm]
    if arm.images is None:
        return None
    guide, classes = None, patches.classes
    folders = made_folders(config, cell, arm.images, patches)
    pool = candidates(folders, arm, classes=classes, preprocessing=patches.preprocessing)
    if arm.asks_guide:
        _require_made(size_folder(config, cell.size) / GUIDE, guide_key(config, cell.size), "the guide")
        guide = inference.load(checkpoint.latest(size_folder(config, cell.size) / GUIDE), device)

    def look(batch: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        return inference.features(guide, batch, device=device), inference.predict(guide, batch, device=device)

    centroids = None
    if guide is not None:
        features, labels = inference.features(guide, patches.centre(train), device=device), patches.labels[train]
        centroids = np.stack([features[labels == number].mean(0) for number in range(len(classes))])
    draw = numpy_generator(config.seed, cell.seed, "study selection")
    try:
        options = {"num_real": len(train), "classes": classes, "centroids": centroids, "generator": draw}
        return choose(pool, arm, look=None if guide is None else look, **options)
    except UserError as error:
        raise UserError(f"arms.{cell.arm}.{error}") from error


def run_cell(config: StudyConfig, cell: Cell) -> None:
    """Train a cell's classifier and write `probabilities.npz` (val and test, (N, num_classes) float32, calibrated on
    the validation split) and `result.json`; nothing where they are there. A stopped training goes on."""
    folder, digest, began = cell_folder(config, cell), cell_digest(config, cell), time.monotonic()
    if result_of(config, cell) is not None:
        return
    (folder / "result.json").unlink(missing_ok=True)
    whole, config = config, sized(config, cell.size)
    patches = load_patches(config.data, seed=config.seed)
    train = patches.indices("train")
    fabric = make_fabric(config.train, section="train")
    fabric.launch()
    made = _made(config, patches, cell, train, fabric.device)
    task = CellTask(config, patches, cell, train, made)
    if task.is_frozen:
        task.fill_bank(fabric.device)
    folder.mkdir(parents=True, exist_ok=True)
    pace = {"checkpoint_every": config.train.steps, "validate_every": config.train.steps, "log_every": 100}
    begun = folder / "training" / "digest.txt"
    if not begun.exists() or begun.read_text() != digest:  # a stopped training of other settings does not go on
        shutil.rmtree(folder / "training", ignore_errors=True)
        begun.parent.mkdir(parents=True)
        begun.write_text(digest)
    newest = fit(task, config, config.train.model_copy(update=pace), folder=folder / "training", fabric=fabric)
    checkpoint.load_weights(newest, task.model)
    logits, cache = {}, config.output / "features" / feature_key(whole, cell)
    for split in ("val", "test"):
        chosen = patches.indices(split)
        logits[split] = task.logits(task.model, chosen, fabric.device, cache=cache / f"{split}.npy")
    labels = patches.labels[patches.indices("val")]
    targets, weights = np.eye(len(patches.classes))[labels], balanced_weights(labels)
    temperature = fit_temperature(logits["val"], targets, weights)
    result: dict[str, Any] = {
        **cell._asdict(),
        "digest": digest,
        "num_real": len(train),
        "num_made": 0 if made is None else len(made.patches),
        "steps": config.train.steps,
        "temperature": temperature,
        "val_nll": negative_log_likelihood(logits["val"], targets, weights, temperature=temperature),
        "seconds": round(time.monotonic() - began, 2),
    }
    with replacing(folder / "probabilities.npz") as temporary, open(temporary, "wb") as file:
        found = {split: softmax(of / temperature, axis=1).astype(np.float32) for split, of in logits.items()}
        np.savez(file, **found)
    replace_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
    shutil.rmtree(folder / "training")
    (folder / "error.txt").unlink(missing_ok=True)
