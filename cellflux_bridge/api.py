"""A trained bridge as a Python object: `Bridge.load("runs/lung").translate(images)`."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from pydantic import ValidationError
from torch import nn

from cellflux_bridge import images as image_io
from cellflux_bridge.config import Config, TranslateConfig, load_config
from cellflux_bridge.data.pairs import named_transitions
from cellflux_bridge.data.patches import Patches, load_patches
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.errors import UserError
from cellflux_bridge.files import replace_text
from cellflux_bridge.guidance.classifier_free import ClassifierFree
from cellflux_bridge.path.base import Path as FlowPath
from cellflux_bridge.progress import progress
from cellflux_bridge.schema import explain, nearest
from cellflux_bridge.training import checkpoint
from cellflux_bridge.training.flow import build_flow, class_level
from cellflux_bridge.training.loop import make_fabric, on_rank_zero
from cellflux_bridge.training.run import differences, require_held_out
from cellflux_bridge.trajectory import (
    Trajectory,
    TrajectoryHeader,
    TrajectoryWriter,
    linear_soft_labels,
    read_header,
)
from cellflux_bridge.transport.morph import morph, morph_levels, source_noise
from cellflux_bridge.velocity.condition import Condition


class Bridge:
    """A trained flow with all it needs to carry images from one class to another.

    `config` is the resolved configuration of the run; `classes` its class names; `preprocessing` how a file's pixels
    become the network's input.
    """

    def __init__(
        self,
        *,
        config: Config,
        path: FlowPath,
        network: nn.Module,
        preprocessing: Preprocessing,
        step: int,
        fabric: Fabric,
    ):
        self.config, self.path, self.preprocessing, self.step = config, path, preprocessing, step
        self._network = network.to(fabric.device, memory_format=torch.channels_last).eval()
        self.fabric = fabric

    @classmethod
    def load(cls, run: str | Path, overrides: Sequence[str] = (), *, fabric: Fabric | None = None) -> "Bridge":
        """The newest checkpoint of a run folder (or a checkpoint folder itself).

        `overrides` are `key.sub=value` settings of this use, such as translate.steps=50 or train.accelerator=cpu; the
        network's architecture always comes from the checkpoint. Raises UserError for a folder without checkpoint, and
        for weights that are truncated or of another architecture.
        """
        folder = checkpoint.latest(Path(run))
        trained = checkpoint.read_config(folder)
        path, network = build_flow(trained)
        checkpoint.load_weights(folder, network)
        # The run's own file may have newer settings of translation than its last checkpoint has, and may have moved.
        if folder == Path(run):
            config = load_config(folder / checkpoint.CONFIG, overrides)
        else:
            config = load_config(Path(run) / checkpoint.CONFIG, overrides, output=Path(run))
        differing = differences(trained, config, ignore=("train", "classifier", "data.root"))
        if differing:
            raise UserError(f"{folder}: was trained otherwise and cannot be used with {', '.join(differing)}")
        if fabric is None:
            alone = config.train.model_copy(update={"devices": 1, "num_nodes": 1, "strategy": "auto"})
            fabric = make_fabric(alone)
            fabric.launch()  # joins the other processes under torchrun
        return cls(
            config=config,
            path=path,
            network=network,
            step=checkpoint.step_of(folder),
            preprocessing=Preprocessing.load(folder / checkpoint.PREPROCESSING),
            fabric=fabric,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config.data.classes)

    def _settings(self, source: str | None, target: str | None, options: dict) -> TranslateConfig:
        try:
            settings = TranslateConfig(**{**self.config.translate.model_dump(), **options})
        except ValidationError as error:
            raise UserError(explain(error, TranslateConfig, prefix="translate")) from error
        source, target = source or settings.source, target or settings.target
        if source is None and target is None and len(self.classes) == 2:
            source, target = self.classes
        for key, label in (("source", source), ("target", target)):
            if label not in self.classes:
                hint = nearest(label, self.classes) if label else ""
                known = ", ".join(self.classes)
                raise UserError(f"translate.{key}: {label!r} is no class of this run{hint}; known: {known}")
        pair = (target, source) if settings.reverse else (source, target)
        trained = named_transitions(self.classes, self.config.pairs)
        if pair not in trained:
            known = ", ".join(f"{a} -> {b}" for a, b in trained)
            raise UserError(f"the network never saw {pair[0]} -> {pair[1]}; it was trained on {known}")
        return settings.model_copy(update={"source": source, "target": target})

    def _header(self, settings: TranslateConfig) -> TrajectoryHeader:
        levels = morph_levels(
            self.path, steps=settings.steps, frames=settings.frames, solver=settings.solver, reverse=settings.reverse
        )
        digest = self.config.model_copy(update={"translate": settings}).digest()
        return TrajectoryHeader(
            method="path",
            source=settings.source,
            target=settings.target,
            classes=self.classes,
            levels=levels,
            config_hash=f"{digest}@{self.step}",
        )

    def translate(
        self,
        images: torch.Tensor | Sequence[str | Path | np.ndarray],
        *,
        source: str | None = None,
        target: str | None = None,
        ids: Sequence[str] | None = None,
        **options,
    ) -> Trajectory:
        """Carry images of class `source` to class `target` (both may be left out where there are two classes).

        `images` are files, RGB uint8 arrays (H, W, 3) of any size (scaled and cropped as in training), or patches
        (B, 3, S, S) uint8 that are so already. `ids` seed each image's noise and name its sequence (default: file
        names or numbers). `options` are keys of the `translate` section: steps, frames, solver, guidance_scale,
        reverse. Raises UserError for unknown classes and for what the path cannot do.
        """
        settings = self._settings(source, target, options)
        batch = self._as_patches(images)
        if ids is None:
            named = isinstance(images, Sequence) and all(isinstance(i, (str, Path)) for i in images)
            ids = [str(i) for i in images] if named else [str(i) for i in range(len(batch))]
        if not len(ids) == len(set(ids)) == len(batch):
            raise UserError(f"ids: {len(batch)} images need as many different ids, found {len(set(ids))} in {len(ids)}")
        size = settings.batch_size
        return Trajectory.cat(
            [
                self._translate_batch(batch[start : start + size], ids[start : start + size], settings)
                for start in range(0, len(batch), size)
            ]
        )

    def _as_patches(self, images) -> torch.Tensor:
        size = self.preprocessing.image_size
        if isinstance(images, torch.Tensor):
            if images.dtype != torch.uint8 or images.shape[1:] != (3, size, size) or len(images) == 0:
                raise UserError(
                    f"images: expected uint8 (B, 3, {size}, {size}), found {images.dtype} {tuple(images.shape)}; "
                    "give files or (H, W, 3) arrays to have them scaled"
                )
            return images
        patches = []
        for number, image in enumerate(images):
            rgb = image if isinstance(image, np.ndarray) else image_io.read_rgb(Path(image))
            if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
                raise UserError(f"images[{number}]: expected RGB uint8 (H, W, 3), found {rgb.dtype} {rgb.shape}")
            name = f"images[{number}]" if isinstance(image, np.ndarray) else str(image)
            patches.append(self.preprocessing(rgb, name=name))
        if not patches:
            raise UserError("images: none given")
        return torch.from_numpy(np.stack(patches).transpose(0, 3, 1, 2).copy())

    def condition(self, settings: TranslateConfig, x0: torch.Tensor) -> Condition:
        """The condition of source images x0 (B, 3, S, S) under a translation's settings."""
        source, target = settings.source, settings.target
        if settings.reverse:
            source, target = target, source
        number, spec = self.classes.index(target), self.config.condition

        def filled(value, dtype) -> torch.Tensor:
            return torch.full((len(x0),), value, dtype=dtype, device=x0.device)

        return Condition(
            target_class=filled(number, torch.long),
            level=filled(class_level(number, len(self.classes)), torch.float32) if spec.target == "level" else None,
            source_class=filled(self.classes.index(source), torch.long) if spec.source_class else None,
            source_image=x0 if spec.source_image else None,
        )

    def _translate_batch(self, batch: torch.Tensor, ids: Sequence[str], settings: TranslateConfig) -> Trajectory:
        x0 = image_io.encode(batch).to(self.fabric.device)
        noise = source_noise(x0.shape[1:], ids, seed=self.config.seed).to(x0)
        with self.fabric.autocast():
            result = morph(
                ClassifierFree(self._network, settings.guidance_scale),
                self.path,
                x0,
                self.condition(settings, x0),
                noise=noise,
                steps=settings.steps,
                frames=settings.frames,
                solver=settings.solver,
                reverse=settings.reverse,
            )
        header = self._header(settings)
        frames = image_io.decode(result.frames).cpu().numpy()
        return Trajectory(header, frames, linear_soft_labels(header, len(ids)), tuple(ids), (result.nfe,) * len(ids))

    def patches(self) -> Patches:
        """The patches at `data.root`, prepared as they were for training, even where they are not those."""
        patches = load_patches(self.config.data, seed=self.config.seed)
        if patches.preprocessing != self.preprocessing:
            patches = load_patches(self.config.data, seed=self.config.seed, reference=self.preprocessing.reference)
        require_held_out(self.config.output, patches)
        return patches

    def translate_split(
        self,
        *,
        source: str | None = None,
        target: str | None = None,
        output: Path | None = None,
        overwrite: bool = False,
    ) -> tuple[Path, dict[str, float]]:
        """Carry the run's own patches of a split to another class, written batch by batch; returns folder and figures.

        Sources are `translate.num` of the split, drawn by the seed. A folder that holds a part of the same translation
        is completed; `overwrite` removes one that differs. With several processes each takes its share of the sources.
        """
        settings, fabric = self._settings(source, target, {}), self.fabric
        on_rank_zero(fabric, self.patches)  # fills the cache for all
        patches = self.patches()
        chosen = patches.sample(settings.split, settings.source, num=settings.num, seed=self.config.seed)
        if len(chosen) == 0:
            raise UserError(f"translate.split: no patch of class {settings.source!r} in the {settings.split} split")
        name = f"{settings.source}_to_{settings.target}" + ("_reverse" if settings.reverse else "")
        folder = output or self.config.output / "trajectories" / name
        header = self._header(settings)

        def open_folder() -> None:
            if overwrite and (folder / "trajectory.json").exists() and read_header(folder) != header:
                shutil.rmtree(folder)
            TrajectoryWriter(folder, header)

        on_rank_zero(fabric, open_folder)
        writer = TrajectoryWriter(folder, header, rank=fabric.global_rank)
        missing = [n for n, i in enumerate(chosen) if patches.ids[i] not in writer.done]
        fabric.barrier()  # all have read what is done before anyone adds to it
        todo = missing[fabric.global_rank :: fabric.world_size]
        began = time.monotonic()
        bar = progress(
            range(0, len(todo), settings.batch_size),
            desc=f"{settings.source} -> {settings.target}",
            unit="batch",
            disable=not fabric.is_global_zero,
        )
        for start in bar:
            numbers = todo[start : start + settings.batch_size]
            indices = chosen[numbers]
            trajectory = self._translate_batch(patches.centre(indices), [patches.ids[i] for i in indices], settings)
            writer.append(trajectory, numbers=numbers)
        seconds = time.monotonic() - began
        fabric.barrier()
        if fabric.is_global_zero:
            writer.finish()
            used = self.config.model_copy(update={"translate": settings})
            replace_text(folder / "config.yaml", used.to_yaml())
        figures = {"sequences": len(chosen), "made_now": len(missing), "seconds": seconds}
        return folder, figures
