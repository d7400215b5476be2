"""What every maker of sequences shares: images in, Trajectories out, of a whole split batch by batch."""

import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from pydantic import ValidationError

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
from cellflux_bridge.translation.inputs import Context, Images, Sources, of_images, of_split
from cellflux_bridge.translation.settings import TranslateConfig, without_foreign_keys

# Sequences whose sources are looked at before a folder is completed: moved patches are, others of the same names not.
_NUM_COMPARED = 8


def translation_fabric(train: TrainConfig, *, section: str) -> Fabric:
    """Fabric of one device of a training's kind, or of torchrun's processes where it started this one."""
    one_device = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    fabric = make_fabric(train.model_copy(update=one_device), section=section)
    fabric.launch()
    return fabric


def _begins_with(folder: Path, sources: Sources) -> bool:
    """Whether the first sequences of a folder begin with the sources that their names mean."""
    number_of = {name: number for number, name in enumerate(sources.ids)}
    begun = [name for name in read_source_ids(folder) if name in number_of][:_NUM_COMPARED]
    made = load_trajectory(folder, source_ids=begun) if begun else None
    return made is None or np.array_equal(made.frames[0], sources.patches([number_of[n] for n in made.source_ids]))


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
    def _translate_batch(
        self, batch: torch.Tensor, ids: Sequence[str], settings: TranslateConfig, context: Context
    ) -> Trajectory:
        """The sequences of sources (B, C, S, S) uint8."""

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
        images: Images,
        *,
        source: str | None = None,
        target: str | None = None,
        ids: Sequence[str] | None = None,
        **options,
    ) -> Trajectory:
        """Carry images of class `source` to class `target` (both may be left out where there are two classes).

        `images` are a file, a folder, a PIL image or an RGB uint8 array (H, W, 3), of any size (scaled and cropped as
        in training), a list of these, or patches (B, 3, S, S) uint8. `ids` seed each image's noise and name its
        sequence (default: names of files, below their folder, or numbers). `options` are keys of the `translate`
        section. Raises UserError for what the networks or the path cannot do.
        """
        settings, sources = self._settings(source, target, options), of_images(images, self.preprocessing)
        ids = sources.ids if ids is None else list(ids)
        if not len(ids) == len(set(ids)) == len(sources.ids):
            num = len(sources.ids)
            raise UserError(f"ids: {num} images need as many different ids, found {len(set(ids))} in {len(ids)}")
        batch = sources.patches(range(len(ids)))  # all of them, before the first is carried
        sources = Sources(ids, lambda numbers: batch[list(numbers)])
        parts = self._batches(sources, range(len(ids)), settings, batch_name="translating")
        return Trajectory.cat([trajectory for _, trajectory in parts])

    def _batches(
        self, sources: Sources, numbers: Sequence[int], settings: TranslateConfig, *, batch_name: str
    ) -> Iterator[tuple[Sequence[int], Trajectory]]:
        """The sequences of sources of these numbers, batch by batch, under a bar that counts finished images."""
        num_levels = len(self._header(settings).levels) - 1
        options = {"total": len(numbers) * num_levels, "unit": "image", "delay": 1}
        with progress(desc=batch_name, disable=not self.fabric.is_global_zero, **options) as bar:
            for start in range(0, len(numbers), settings.batch_size):
                part = numbers[start : start + settings.batch_size]
                ids, context = [sources.ids[n] for n in part], sources.context(part)
                yield part, self._translate_batch(sources.patches(part), ids, settings, context)
                bar.update(len(part) * num_levels)

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

        def mpp() -> float | None:
            records, _ = list_records(self.config.data, seed=seed)
            return frame_mpp(records, self.preprocessing)

        with only_writer(fabric, folder):
            return folder, self._complete(settings, folder, of_split(patches, chosen), mpp, overwrite=overwrite)

    def translate_images(
        self,
        images: Path,
        *,
        source: str | None = None,
        target: str | None = None,
        output: Path | None = None,
        overwrite: bool = False,
    ) -> tuple[Path, dict[str, float]]:
        """Carry all images of a folder, or one file, as `translate_split` carries patches of the run's own data.

        By default they are written to a folder of the run that is named after `images`, too.
        """
        settings, sources = self._settings(source, target, self._given), of_images(images, self.preprocessing)
        name = safe_name(f"{self._name(settings)}_of_{images.resolve().name}")
        folder = output or self.config.output / "trajectories" / name
        with only_writer(self.fabric, folder):
            return folder, self._complete(settings, folder, sources, lambda: None, overwrite=overwrite)

    def _complete(
        self,
        settings: TranslateConfig,
        folder: Path,
        sources: Sources,
        mpp: Callable[[], float | None],
        *,
        overwrite: bool,
    ) -> dict[str, float]:
        """Make the sequences of sources that `folder` lacks; the figures of `translate_split`. `mpp()` are microns per
        pixel of the frames."""
        fabric = self.fabric
        made_with = self.config.model_copy(update={"translate": settings})

        def make_header() -> TrajectoryHeader:
            return replace(self._header(settings), mpp=mpp())

        header = from_rank_zero(fabric, make_header)

        def open_folder() -> None:
            is_trajectory = overwrite and (folder / "trajectory.json").exists()
            if is_trajectory and (read_header(folder) != header or not _begins_with(folder, sources)):
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
            if not _begins_with(folder, sources):
                raise UserError(
                    f"{folder}: holds sequences of other images, which have the same names as these; "
                    "choose another --output, or replace it with --overwrite"
                )

        on_rank_zero(fabric, open_folder)
        writer = TrajectoryWriter(folder, header, rank=fabric.global_rank)
        missing = [number for number, name in enumerate(sources.ids) if name not in writer.done]
        fabric.barrier()  # all have read what is done before anyone adds to it
        todo = missing[fabric.global_rank :: fabric.world_size]
        if missing:
            self._prepare(settings)
        began, cpu_began = time.monotonic(), time.process_time()
        for numbers, trajectory in self._batches(
            sources, todo, settings, batch_name=f"{settings.source} -> {settings.target}"
        ):
            writer.append(trajectory, numbers=numbers)
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
        return {"sequences": len(sources.ids), "made_now": len(missing), **cost}
