"""Damaged and hostile files, drawn by a seed: whoever reads one reads it or gives a UserError, in time and memory that
are bounded.

    python tests/fuzz.py --seed 1 --inputs 5000

It stands outside the test suite. It prints every input that gives another exception, takes over 20 s or 1 GiB, and ends
with status 1 where there is one. The same seed draws the same inputs.
"""

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
import yaml

from cellflux_bridge import checkpoint, images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import load_config
from cellflux_bridge.data.index import patch_index
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.flow.network import build_flow
from cellflux_bridge.metrics.cost import read_cost
from cellflux_bridge.report import reading
from cellflux_bridge.report.page import write_report
from cellflux_bridge.training.optimiser import learning_rate
from cellflux_bridge.trajectory import Trajectory, TrajectoryHeader, iter_trajectory, load_trajectory

SECONDS, BYTES = 20, 2**30
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
METRICS = {
    "format": reading.METRICS_FORMAT, "source": "A", "target": "B", "warnings": ["w"], "spectra": {"m": [1.0, 2.0]},
    "networks": [{"name": "rgb", "use": "judge", "view": "rgb", "checkpoint": "c", "image_size": 16, "digest": "d"}],
    "methods": [{"name": "m", "trajectory": "t", "method": "path", "config_hash": "h", "n": 2, "levels": [0.5, 1.0],
                 "frame_levels": [0.5, 1.0], "device": "cpu", "unguided": None}],
    "values": [{"trajectory": "t", "method": "m", "quantity": "flip_rate", "level": 1.0, "extractor": "rgb", "n": 2,
                "n_real": None, "split": "test", "value": 0.5, "low": 0.1, "high": 0.9}],
    "differences": [], "memorisation": {"patches": "p", "near_copies": []},
}  # fmt: skip
CELLULARITY = {
    "format": reading.CELLULARITY_FORMAT, "parameters": {}, "mpp": 0.5, "real": [], "real_by_level": [],
    "trajectories": [{"trajectory": "t", "config_hash": "h", "levels": [0.0, 1.0], "curves": [], "spearman": [],
                      "per_source": [{"source_id": "a", "area_fraction": [0.1, None], "count": [1.0, 2.0]}]}],
}  # fmt: skip
PERTURBATIONS = {
    "format": reading.PERTURBATIONS_FORMAT, "name": "run", "notes": ["note"], "drawn": ["one", "two"],
    "rows": [{"method": method, "perturbations": "seen", "figure": figure, "by": "profile",
              "estimate": [0.5, 0.4, None], "num": 9}
             for method in ("real training cells", "controls, untreated", "run")
             for figure in ("KIDc", "perturbation told", "batch told")],
}  # fmt: skip


def deep(depth: int) -> list:
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


def nasty(draw: random.Random):
    """A value that no key expects."""
    return draw.choice(
        [
            *(
                None,
                True,
                False,
                "",
                " ",
                "no",
                "nan",
                "1e400",
                "../../etc/passwd",
                "/",
                "a" * 100_000,
                "\x00",
                "\u202e",
            ),
            *("\ud800", "os:system", "package.module:Class", "hf-hub:x/y", "!!python/object:os.system", "null"),
            *(0, -1, 1, 2, 10**9, 10**30, -(10**30), 2**63, 1e308, -1e308, 1e-320, 0.1, 0.5, 1.0000001),
            *(float("nan"), float("inf"), float("-inf")),
            *(
                [],
                {},
                [[]],
                [None],
                [1, 2, 3],
                {"a": 1},
                {"name": "x"},
                {"name": ["x"]},
                {1: 2},
                deep(50),
                [0] * 10_000,
            ),
        ]
    )


def places(value, path=()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def mutated(value, draw: random.Random):
    """A copy with one to three places replaced, removed, repeated or wrapped."""
    value = {"": copy.deepcopy(value)}
    for _ in range(draw.randint(1, 3)):
        *parents, last = draw.choice([place for place in places(value) if place])
        inside = value
        for key in parents:
            inside = inside[key]
        kind = draw.choice(["replace", "replace", "replace", "remove", "wrap", "more"])
        if kind == "remove" and last != "":
            del inside[last]
        elif kind == "wrap":
            inside[last] = draw.choice([lambda v: [v], lambda v: {"name": v}, str])(inside[last])
        elif kind == "more" and isinstance(inside, list):
            inside.extend([copy.deepcopy(inside[last])] * draw.choice([1, 50]))
        else:
            inside[last] = nasty(draw)
    return value[""]


def damaged(data: bytes, draw: random.Random) -> bytes:
    """A copy with bytes changed, cut, repeated or put in."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(5)
        if kind == 0 and at < len(data):
            data[at] = draw.randrange(256)
        elif kind == 1:
            del data[at : at + draw.choice([1, 4, 100, len(data)])]
        elif kind == 2:
            data[at:at] = draw.choice(
                [b"\x00", b"\xff\xfe", b"\n", b"&a *a", b"{[", b"9" * 400, b"- " * 3000, b"\t", b'"']
            )
        elif kind == 3:
            data[at:at] = data[: draw.choice([10, 1000])]
        elif kind == 4 and at < len(data):
            data[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(data)


def as_text(value, draw: random.Random, dump: Callable[[object], str]) -> bytes:
    try:
        text = dump(value).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):
        text = b"null"
    return damaged(text, draw) if draw.random() < 0.3 else text


def table(text: str, draw: random.Random) -> bytes:
    """A CSV text, half of the time with one other cell, otherwise damaged."""
    if draw.random() < 0.5:
        return damaged(text.encode(), draw)
    rows = [line.split(",") for line in text.splitlines()]
    row = draw.choice(rows)
    value = draw.choice([nasty(draw), "", "-1", "1e999", "nan", "../x", "a/b", "=1", "NA", " train", "\u202e", '"'])
    row[draw.randrange(len(row))] = str(value)
    return "\n".join(map(",".join, rows)).encode(errors="replace")


def kinds(root: Path) -> dict[str, Callable[[random.Random, Path], None]]:
    """By name, what draws an input into an empty folder and reads it."""
    header = TrajectoryHeader("path", "A", "B", ("A", "B"), (0.0, 0.5, 1.0), "h")
    labels = np.array([[1, 0], [0.5, 0.5], [0, 1]], np.float32)[:, None].repeat(2, 1)
    frames = np.zeros((3, 2, 3, 8, 8), np.uint8)
    Trajectory(header, frames, labels, ("a", "b"), (1, 1), (0, 0)).save(root / "trajectory")
    configs = [
        yaml.safe_load(path.read_text()) for path in CONFIGS if path.stem != "nuclei" and "study" not in path.stem
    ]
    pictures = {}
    for suffix in (".png", ".jpg", ".tif", ".npy"):
        pictures[suffix] = root / f"a{suffix}"
        if suffix == ".npy":
            np.save(pictures[suffix], np.zeros((12, 12, 3), np.uint8))
        else:
            images.formats.Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(pictures[suffix])
    torch.save({"model": {"w": torch.zeros(3)}, "step": 1, "seconds": 0.0}, root / "state.pt")

    def config(draw, folder):
        name = draw.choice(["a.yaml", "config.yaml"])
        (folder / name).write_bytes(as_text(mutated(draw.choice(configs), draw), draw, yaml.safe_dump))
        found = load_config(folder / name, output=folder)
        checkpoint.without_memory(lambda: build_flow(found)[1], origin=name)
        learning_rate(found.train.steps - 1, found.train)
        load_config(folder / name, ["seed=1"]).to_yaml()

    def override(draw, folder):
        keys = (
            "seed",
            "train.lr",
            "train.betas",
            "data.classes",
            "velocity",
            "path.scale",
            "translate.levels",
            "data",
            "x",
        )
        values = (
            json.dumps(nasty(draw), default=str),
            str(nasty(draw)),
            "[" * draw.choice([1, 3000]),
            "&a [*a]",
            "{a: b}",
        )
        load_config(CONFIGS[0], [f"{draw.choice(keys)}={draw.choice(values)}"])

    def trajectory(draw, folder):
        shutil.copytree(root / "trajectory", folder / "t")
        file = (
            folder
            / "t"
            / draw.choice(["trajectory.json", "trajectory.json", "manifest.csv", "frames/000000_a/001.png"])
        )
        if file.suffix == ".json":
            file.write_bytes(as_text(mutated(json.loads(file.read_text()), draw), draw, json.dumps))
        elif draw.random() < 0.05:
            file.unlink()
            draw.choice([lambda: file.mkdir(), lambda: file.symlink_to("/etc/passwd"), lambda: os.mkfifo(file)])()
        else:
            file.write_bytes(damaged(file.read_bytes(), draw))
        load_trajectory(folder / "t")
        list(iter_trajectory(folder / "t"))

    def metrics(draw, folder):
        (folder / "m.json").write_bytes(as_text(mutated(METRICS, draw), draw, json.dumps))
        reading.read(folder / "m.json", reading.Metrics)

    def cellularity(draw, folder):
        (folder / "c.json").write_bytes(as_text(mutated(CELLULARITY, draw), draw, json.dumps))
        reading.read(folder / "c.json", reading.Cellularity)

    def perturbations(draw, folder):
        (folder / "perturbations.json").write_bytes(as_text(mutated(PERTURBATIONS, draw), draw, json.dumps))
        log = {"step": 1, "val/condition_gain": 0.0, "val/condition_gain_error": 0.1}
        (folder / "metrics.jsonl").write_bytes(as_text(mutated(log, draw), draw, json.dumps))
        write_report([folder], folder / "page.html")

    def cost(draw, folder):
        (folder / "cost.json").write_bytes(
            as_text(
                mutated({"sequences": 2, "device": "cpu", "seconds": 1.0, "cpu_seconds": 1.0}, draw), draw, json.dumps
            )
        )
        read_cost(folder)

    def preprocessing(draw, folder):
        value = {"image_size": 32, "crop": None, "reference": None}
        (folder / "preprocessing.json").write_bytes(as_text(mutated(value, draw), draw, json.dumps))
        Preprocessing.load(folder / "preprocessing.json")

    def picture(draw, folder):
        suffix = draw.choice(sorted(pictures))
        file = folder / f"a{suffix}"
        file.write_bytes(damaged(pictures[suffix].read_bytes(), draw))
        images.read_size(file)
        images.read_rgb(file)

    def state(draw, folder):
        (folder / "state.pt").write_bytes(damaged((root / "state.pt").read_bytes(), draw))
        checkpoint.load_state(folder, most=10**6)

    def manifest(draw, folder):
        text = "path,label,group,split,score\n" + "".join(f"{n}.png,{'AB'[n % 2]},g{n},train,0.{n}\n" for n in range(8))
        for n in range(8):
            shutil.copy(pictures[".png"], folder / f"{n}.png")
        (folder / "manifest.csv").write_bytes(table(text, draw))
        patch_index(load_config(CONFIGS[0].with_name("own.yaml"), [f"data.root={folder}"]).data, seed=0)

    def screen(draw, folder):
        names = [f"w_{n}" for n in range(6)]
        text = "SAMPLE_KEY,STATE,CPD_NAME,BATCH,DOSE,SPLIT\n" + "".join(
            f"{name},{n % 2},{('DMSO', 'x')[n % 2]},p{n // 3},{n},train\n" for n, name in enumerate(names)
        )
        for name in names:
            shutil.copy(pictures[".npy"], folder / f"{name}.npy")
        (folder / "index.csv").write_bytes(table(text, draw))
        if draw.random() < 0.3:
            file = folder / f"{draw.choice(names)}.npy"
            file.write_bytes(damaged(file.read_bytes(), draw))
        keys = {
            "name": "imaging", "index": "index.csv", "key": "SAMPLE_KEY", "file": "{SAMPLE_KEY}.npy", "state": "STATE",
            "control": "0", "perturbation": "CPD_NAME", "batch": "BATCH", "dose": "DOSE", "split": "SPLIT",
        }  # fmt: skip
        key = draw.choice([*keys, ""])
        if key and draw.random() < 0.5:
            keys[key] = draw.choice([*keys.values(), "{x}", "{", "../{SAMPLE_KEY}.npy", nasty(draw)])
        given = yaml.safe_dump({"data": {"root": str(folder), "layout": keys, "channels": 3}})
        (folder / "screen.yaml").write_text(given)
        data = load_config(folder / "screen.yaml").data
        for record in patch_index(data, seed=0).records():
            Preprocessing.of(data).read(record.file)

    def study(draw, folder):
        from cellflux_bridge.study.settings import StudyConfig

        found = yaml.safe_load(draw.choice([path for path in CONFIGS if "study" in path.stem]).read_text())
        (folder / "study.yaml").write_bytes(as_text(mutated(found, draw), draw, yaml.safe_dump))
        load_config(folder / "study.yaml", schema=StudyConfig).beside(CONFIGS[0].parent)

    def published_tree(draw, folder):
        from cellflux_bridge.data import published

        source, name = folder / "source", draw.choice(["mhist", "chaoyang"])
        if name == "mhist":
            place, names = source / "images", ["MHIST_aaa.png", "MHIST_aab.png"]
            head = "Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),Partition\n"
            listed = {"annotations.csv": f"{head}MHIST_aaa.png,SSA,6,train\nMHIST_aab.png,HP,2,test\n"}
        else:
            place, names = source / "train", ["353042_4-IMG005x014-1.png", "535940-IMG009x024-2.png"]
            rows = [{"name": f"train/{name}", "label": number} for number, name in enumerate(names, 1)]
            listed = {"train.json": json.dumps(rows), "test.json": "[]"}
        place.mkdir(parents=True)
        for number, each in enumerate(names):
            images.write_png(place / each, np.full((8, 8, 3), number, np.uint8))
        for file, text in listed.items():
            (source / file).write_bytes(table(text, draw))
        published.base.prepare(published.find(name), source, folder / "out", other_counts=True)

    return {"config": config, "override": override, "screen": screen, "study": study, "published": published_tree,
            "trajectory": trajectory, "metrics": metrics, "cost": cost,
            "preprocessing": preprocessing, "perturbations": perturbations,
            "cellularity": cellularity, "picture": picture, "state": state, "manifest": manifest}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=2000)
    args = parser.parse_args()
    warnings.simplefilter("ignore")

    def too_slow(number, frame):
        raise TimeoutError(f"took over {SECONDS} s")

    signal.signal(signal.SIGALRM, too_slow)
    counts, bad = Counter(), []
    with tempfile.TemporaryDirectory() as place:
        readers = kinds(Path(place))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for number in range(args.inputs):
            draw = random.Random(f"{args.seed} {number}")
            name = draw.choice(sorted(readers))
            folder = Path(place) / "input"
            folder.mkdir()
            began, outcome = time.monotonic(), "read"
            signal.alarm(SECONDS)
            try:
                with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                    readers[name](draw, folder)
            except UserError:
                outcome = "refused"
            except Exception as error:
                outcome = "BAD"
                bad.append(f"{name}, input {number}: {type(error).__name__}: {error!s:.300}")
            signal.alarm(0)
            counts[f"{name}: {outcome}"] += 1
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if now > peak + BYTES:
                bad.append(f"{name}, input {number}: took {(now - peak) / 2**30:.1f} GiB")
            peak = max(peak, now)
            took = time.monotonic() - began
            if took > SECONDS / 4:
                print(f"slow: {name}, input {number}: {took:.1f} s", flush=True)
            if took >= SECONDS:  # the alarm's TimeoutError is an OSError, which readers may have turned into theirs
                bad.append(f"{name}, input {number}: took {took:.1f} s")
            shutil.rmtree(folder)
    for what, count in sorted(counts.items()):
        print(f"{count:6d}  {what}")
    print(*bad, sep="\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
