"""Kills at random moments: a job that is killed and called again gives what it gives undisturbed, bit for bit.

    python tests/chaos.py --seed 1 --kills 40

It stands outside the test suite: a kill takes about ten seconds on one core. Six kinds of job take turns. Each is first
run undisturbed, then begun anew and killed (SIGKILL, with all its processes) at moments drawn by the seed, until it
ends by itself. It prints what differs, and ends with status 1 where something does.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

# All paths are relative, so that a folder can be copied and gone on with.
CONFIG = {
    "output": "runs/x",
    "data": {
        "root": "phantom", "classes": ["A", "B"], "image_size": 32, "cache_dir": "cache",
        "layout": {"name": "phantom", "size": 32, "num_train": 60, "num_val": 20, "num_test": 20, "num_range": 0},
    },
    "path": {"name": "noised_source", "scale": 0.7},
    "condition": {"target": "level", "level": "crossfit", "source_class": False, "source_image": True},
    "velocity": {"name": "unet", "channels": 16, "multipliers": [1, 2], "blocks": 1, "attention": []},
    "train": {"steps": 60, "batch_size": 8, "checkpoint_every": 7, "validate_every": 20, "sample_every": 20},
    "refiner": {"scale": 0.2, "velocity": {"channels": 8}, "train": {"steps": 40, "checkpoint_every": 5}},
    "classifier": {"train": {"steps": 40, "batch_size": 8, "checkpoint_every": 5, "validate_every": 10}},
    "translate": {"source": "A", "target": "B", "method": "progression", "levels": 10, "steps": 4, "num": 20,
                  "batch_size": 2, "noise_resampling": 1.0},
}  # fmt: skip
JUDGES = ["--judge", "runs/x/judge_rgb", "--features", "runs/x/features/judge_rgb"]
# A kind of job: its command, what is made beforehand, and the files that it makes.
JOBS = {
    "flow": (
        ["train", "c.yaml"],
        (),
        "runs/x/checkpoints/*/model.safetensors runs/x/refiner/checkpoints/*/model.safetensors runs/x/levels.csv",
    ),
    "judge": (["train-classifier", "c.yaml"], (), "runs/x/judge_rgb/checkpoints/*/model.safetensors"),
    "features": (
        ["train-classifier", "c.yaml", "classifier.seed=1", "output=runs/x/features"],
        (),
        "runs/x/features/judge_rgb/checkpoints/*/model.safetensors",
    ),
    "translate": (["translate", "runs/x"], ("flow",), "runs/x/trajectories/*/frames/*/*.png"),
    "evaluate": (
        ["evaluate", "runs/x", *JUDGES, "--output", "runs/x/metrics.json"],
        ("flow", "translate", "judge", "features"),
        "runs/x/metrics.frames.csv runs/x/metrics.cache/*",
    ),
    "cellularity": (
        ["cellularity", "runs/x", "--method", "classical", "--output", "runs/x/cellularity.json"],
        ("flow", "translate"),
        "runs/x/cellularity.csv",
    ),
}


def begun(job: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "cellflux_bridge.cli", *JOBS[job][0]]
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def finished(job: str, folder: Path) -> None:
    if begun(job, folder).wait():
        raise SystemExit(f"{job} failed undisturbed: {(folder / 'log.txt').read_text()[-2000:]}")


def digests(job: str, folder: Path) -> dict[str, str]:
    files = [file for pattern in JOBS[job][2].split() for file in sorted(folder.glob(pattern)) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=40, help="so many in all (40)")
    args = parser.parse_args()
    draw, wrong, killed = random.Random(args.seed), 0, dict.fromkeys(JOBS, 0)
    with tempfile.TemporaryDirectory() as root:
        before, wanted, seconds = {}, {}, {}
        for job, (_, needed, _) in JOBS.items():
            before[job] = folder = Path(root, job)
            for other in needed:
                shutil.copytree(Path(root, f"{other}-done"), folder, dirs_exist_ok=True)
            folder.mkdir(exist_ok=True)
            (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
            done = shutil.copytree(folder, Path(root, f"{job}-done"))
            began = time.monotonic()
            finished(job, done)
            wanted[job], seconds[job] = digests(job, done), time.monotonic() - began
            print(f"{job}: {seconds[job]:.0f} s undisturbed, {len(wanted[job])} files", flush=True)
        while sum(killed.values()) < args.kills:
            job = min(JOBS, key=lambda name: (killed[name], draw.random()))
            folder = shutil.copytree(before[job], Path(root, "trial"))
            while True:
                process, moment = begun(job, folder), draw.uniform(0.3, 1) * seconds[job]
                try:
                    code = process.wait(timeout=moment)
                    break
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    killed[job] += 1
                    if killed[job] % 3 == 0 or sum(killed.values()) >= args.kills:  # a third goes to its end
                        code = begun(job, folder).wait()
                        break
            found = digests(job, folder)
            differ = sorted(name for name in wanted[job] | found if wanted[job].get(name) != found.get(name))
            if code or differ:
                wrong += 1
                print(f"{job}: status {code}, differs in {differ[:5]}\n{(folder / 'log.txt').read_text()[-1500:]}")
            shutil.rmtree(folder)
    print(f"seed {args.seed}: {sum(killed.values())} kills {killed}, {wrong} wrong")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
