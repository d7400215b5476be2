"""What every maker of sequences shares: images in, Trajectories out, of a whole split batch by batch."""

import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from pydantic import ValidationError

from cellflux_bridge import images as image_io
from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.files import replace_text, safe_name
from cellflux_bridge.base.locks import LOCK
from cellflux_bridge.base.progress import progress
from cellflux_bridge.config import Config, load_config, merged
from cellflux_bridge.config.registry import trusting
from cellflux_bridge.config.schema import explain, nearest
from cellflux_bridge.data.index import frame_mpp, list_records
from cellflux_bridge.data.pairs import named_transitions
from cellflux_bridge.data.patches import Patches, load_patches
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.training.loop import from_rank_zero, make_fabric, on_rank_zero
from cellflux_bridge.training.processes import only_writer
from cellflux_bridge.training.run import differences, require_held_out
from cellflux_bridge.training.settings import TrainConfig
from cellflux_bridge.trajectory import (
    Trajectory,
    TrajectoryHeader,
    TrajectoryWriter,
    load_trajectory,
    read_header,
    read_source_ids,
)
from cellflux_bridge.translation.settings import TranslateConfig, without_foreign_keys

# Sequences whose sources are looked at before a folder is completed: moved patches are, others of the same names not.
_NUM_COMPARED = 8


def translation_fabric(train: TrainConfig, *, section: str) -> Fabric:
    """Fabric of one device of a training's kind, or of torchrun's processes where it started this one."""
    one_device = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    fabric = make_fabric(train.model_copy(update=one_device), section=section)
    fabric.launch()
    return fabric


def _begins_with(folder: Path, patches: Patches, chosen: np.ndarray) -> bool:
    """Whether the first sequences of a folder begin with the chosen patches that their names mean."""
    index_of = {patches.ids[i]: i for i in chosen}
    begun = [name for name in read_source_ids(folder) if name in index_of][:_NUM_COMPARED]
    made = load_trajectory(folder, source_ids=begun) if begun else None
    return made is None or np.array_equal(made.frames[0], patches.centre([index_of[n] for n in made.source_ids]))


def require_finite(frames: torch.Tensor, ids: Sequence[str]) -> None:
    """UserError, which names the first such source, where frames (K+1, B, C, H, W) hold NaN or infinite numbers."""
    is_whole = torch.isfinite(frames).all(0).flatten(1).all(1).tolist()
    if not all(is_whole):
        raise UserError(
            f"{ids[is_whole.index(False)]}: its images are not finite; lower translate.guidance.weight and "
            "translate.guidance_scale, set train.precision=32-true, or use an earlier checkpoint"
        )


class Translator(ABC):
    """Carries images of one class to another.

    `preprocessing` is how a file's pixels become the networks' input, `step` the training step of the checkpoint.
    `given` is what was set in section `translate` for this use: the run's file holds every key, so that it does not
    tell which of them its user means.
    """

    def __init__(
        self,
        *,
        config: Config,
        preprocessing: Preprocessing,
        step: int,
        fabric: Fabric,
        given: Mapping[str, Any] | None = None,
    ):
        self.config, self.preprocessing, self.step, self.fabric = config, preprocessing, step, fabric
        self._given = given or {}

    @abstractmethod
    def _header(self, settings: TranslateConfig) -> TrajectoryHeader:
        """What the sequences of a translation will share; refuses what cannot be done before anything is computed."""

    @abstractmethod
    def _translate_batch(self, batch: torch.Tensor, ids: Sequence[str], settings: TranslateConfig) -> Trajectory:
        """The sequences of sources (B, 3, S, S) uint8."""

    @abstractmethod
    def _require_read(self, settings: TranslateConfig, given: Mapping[str, Any]) -> None:
        """UserError for a key of `translate` that was set for this use and is not read in making these sequences."""

    def _prepare(self, settings: TranslateConfig) -> None:  # noqa: B027
        """Compute what a translation needs once, in all processes; it does not count as the cost of its sources."""

    def _name(self, settings: TranslateConfig) -> str:
        """The folder, below `trajectories/`, of a translation; the method's name of at most 40 bytes follows."""
        return safe_name(f"{settings.source}_to_{settings.target}", room=41)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config.data.classes)

    def _settings(self, source: str | None, target: str | None, options: Mapping[str, Any]) -> TranslateConfig:
        """The settings of a translation: the run's, and over them what is set for it."""
        run = self.config.translate
        try:
            with trusting(False, names=[run.method, str(options.get("method"))]):  # the run's was trusted when loaded
                kept = without_foreign_keys(run.model_dump(), options)
                settings = TranslateConfig(**merged(kept, dict(options)))
        except ValidationError as error:
            raise UserError(explain(error, TranslateConfig, prefix="translate")) from error
        self._require_read(settings, options)
        source, target, known = source or settings.source, target or settings.target, ", ".join(self.classes)
        if source is None and target is None and len(self.classes) == 2:
            source, target = self.classes
        for key, label in (("source", source), ("target", target)):
            if label is None:
                raise UserError(f"translate.{key}: not named; give --source and --target, each one of {known}")
            if label not in self.classes:
                hint = nearest(label, self.classes)
                raise UserError(f"translate.{key}: {label!r} is no class of this run{hint}; known: {known}")
        if source == target and (source, target) not in named_transitions(self.classes, self.config.pairs):
            raise UserError(f"translate.target: {target!r} is the source, too; choose another class")
        return settings.model_copy(update={"source": source, "target": target})

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
        (B, 3, S, S) uint8. `ids` seed each image's noise and name its sequence (default: file names or numbers).
        `options` are keys of the `translate` section. Raises UserError for what the networks or the path cannot do.
        """
        settings = self._settings(source, target, options)
        batch = self._as_patches(images)
        if ids is None:
            named = isinstance(images, Sequence) and all(isinstance(i, (str, Path)) for i in images)
            ids = [str(i) for i in images] if named else [str(i) for i in range(len(batch))]
        if not len(ids) == len(set(ids)) == len(batch):
            raise UserError(f"ids: {len(batch)} images need as many different ids, found {len(set(ids))} in {len(ids)}")
        rows = [slice(n, n + settings.batch_size) for n in range(0, len(batch), settings.batch_size)]
        return Trajectory.cat([self._translate_batch(batch[some], ids[some], settings) for some in rows])

    def _as_patches(self, images) -> torch.Tensor:
        size = self.preprocessing.image_size
        if isinstance(images, torch.Tensor):
            if images.dtype != torch.uint8 or images.shape[1:] != (3, size, size) or len(images) == 0:
                raise UserError(
                    f"images: expected uint8 (B, 3, {size}, {size}), found {images.dtype} {tuple(images.shape)}; "
                    "give files or (H, W, 3) arrays to have them scaled"
                )
            return images
        if isinstance(images, (str, Path)):
            raise UserError(f"images: expected a list of files or arrays, found {images!r}; write [{str(images)!r}]")
        patches = []
        for number, image in enumerate(images):
            rgb, name = image, f"images[{number}]"
            if isinstance(image, (str, Path)):
                rgb, name = image_io.read_rgb(Path(image)), str(image)
            if not isinstance(rgb, np.ndarray):
                found = type(rgb).__name__
                raise UserError(
                    f"{name}: expected a file or an RGB uint8 array (H, W, 3), found {found}; use np.asarray"
                )
            if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
                raise UserError(f"{name}: expected RGB uint8 (H, W, 3), found {rgb.dtype} {rgb.shape}")
            patches.append(self.preprocessing(rgb, name=name))
        if not patches:
            raise UserError("images: none given")
        return torch.from_numpy(np.stack(patches).transpose(0, 3, 1, 2).copy())

    def patches(self) -> Patches:
        """The patches at `data.root`, prepared as they were for training, even where they are not those."""
        data, seed = self.config.data, self.config.seed
        patches = load_patches(data, seed=seed)
        if patches.preprocessing != self.preprocessing:
            patches = load_patches(data, seed=seed, reference=self.preprocessing.reference)
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
        """Carry `translate.num` patches of a split of the run, drawn by the seed; returns the folder and its figures.

        It is written batch by batch. A folder that holds a part of the same translation is completed; `overwrite`
        removes one that differs. With several processes each takes its share of the sources.
        """
        settings, fabric, seed = self._settings(source, target, self._given), self.fabric, self.config.seed
        on_rank_zero(fabric, self.patches)  # fills the cache for all
        patches = self.patches()
        chosen = patches.sample(settings.split, settings.source, num=settings.num, seed=seed)
        if len(chosen) == 0:
            raise UserError(f"translate.split: no patch of class {settings.source!r} in the {settings.split} split")
        folder = output or self.config.output / "trajectories" / self._name(settings)

        with only_writer(fabric, folder):
            return folder, self._complete(settings, folder, patches, chosen, overwrite=overwrite)

    def _complete(
        self, settings: TranslateConfig, folder: Path, patches: Patches, chosen: np.ndarray, *, overwrite: bool
    ) -> dict[str, float]:
        """Make the sequences of the chosen patches that `folder` lacks; the figures of `translate_split`."""
        fabric, seed = self.fabric, self.config.seed
        made_with = self.config.model_copy(update={"translate": settings})

        def make_header() -> TrajectoryHeader:
            records, _ = list_records(self.config.data, seed=seed)
            return replace(self._header(settings), mpp=frame_mpp(records, self.preprocessing))

        header = from_rank_zero(fabric, make_header)

        def open_folder() -> None:
            is_trajectory = overwrite and (folder / "trajectory.json").exists()
            if is_trajectory and (read_header(folder) != header or not _begins_with(folder, patches, chosen)):
                for path in folder.iterdir():  # all but the lock of this process
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    elif not path.name.startswith(LOCK):
                        path.unlink()
            for stale in folder.rglob("*.tmp"):  # of a process that was killed
                stale.unlink(missing_ok=True)
            if (folder / "config.yaml").exists() and read_header(folder) != header:
                ignore = ("classifier", "translate.num", "translate.batch_size")
                if differing := differences(load_config(folder / "config.yaml"), made_with, ignore=ignore):
                    raise UserError(
                        f"{folder}: holds another translation; what differs: {abbreviate(differing)}. Choose another "
                        "--output, or replace it with --overwrite"
                    )
            TrajectoryWriter(folder, header)
            if not _begins_with(folder, patches, chosen):
                raise UserError(
                    f"{folder}: holds sequences of other images, which have the same names as those at data.root; "
                    "choose another --output, or replace it with --overwrite"
                )

        on_rank_zero(fabric, open_folder)
        writer = TrajectoryWriter(folder, header, rank=fabric.global_rank)
        missing = [n for n, i in enumerate(chosen) if patches.ids[i] not in writer.done]
        fabric.barrier()  # all have read what is done before anyone adds to it
        todo = missing[fabric.global_rank :: fabric.world_size]
        if missing:
            self._prepare(settings)
        began, cpu_began = time.monotonic(), time.process_time()
        starts, name = range(0, len(todo), settings.batch_size), f"{settings.source} -> {settings.target}"
        for start in progress(starts, desc=name, unit="batch", disable=not fabric.is_global_zero):
            numbers = todo[start : start + settings.batch_size]
            ids = [patches.ids[i] for i in chosen[numbers]]
            writer.append(self._translate_batch(patches.centre(chosen[numbers]), ids, settings), numbers=numbers)
        cost = {"seconds": time.monotonic() - began}
        if fabric.device.type == "cpu":  # elsewhere it tells how long a GPU was waited for
            cost["cpu_seconds"] = time.process_time() - cpu_began
        fabric.barrier()
        if fabric.is_global_zero:
            writer.finish()
            replace_text(folder / "config.yaml", made_with.to_yaml())
            if todo:  # of this process, and of its last call where it was stopped and went on
                gpu = fabric.device.type == "cuda"
                device = f"cuda: {torch.cuda.get_device_name(fabric.device)}" if gpu else fabric.device.type
                text = json.dumps({"sequences": len(todo), "device": device, **cost})
                replace_text(folder / "cost.json", text + "\n")
        return {"sequences": len(chosen), "made_now": len(missing), **cost}
