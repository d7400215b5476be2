"""Several processes on one folder, full disks, kills and losses of power: nothing is lost, and the message says why."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cellflux_bridge import checkpoint, cli
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import regular, replace_text, reserved
from cellflux_bridge.base.locks import LOCK, writing
from cellflux_bridge.config import load_config
from cellflux_bridge.data.index import left_out
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.data.settings import DataConfig
from cellflux_bridge.images import read_rgb, read_size
from cellflux_bridge.metrics.cost import read_cost
from cellflux_bridge.report import reading
from cellflux_bridge.trajectory import load_trajectory
from cellflux_bridge.translation.base import require_finite


def in_python(code: str, *args) -> subprocess.Popen:
    """A Python process that runs `code` and has its output as a pipe."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


@pytest.fixture
def held(tmp_path):
    """A folder that another process writes to."""
    code = "import sys; from pathlib import Path; from cellflux_bridge.base.locks import writing\n"
    code += "with writing(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    process = in_python(code, tmp_path / "held")
    assert process.stdout.readline() == "held\n"
    yield tmp_path / "held", process
    process.kill()
    process.communicate()


def test_the_second_writer_is_told_who_the_first_is(held):
    folder, process = held
    with pytest.raises(UserError, match=rf"held: process {process.pid} on .*since.*writes here; wait until it has"):
        with writing(folder):
            pass


def test_a_lock_ends_with_its_process_however_that_ends(held):
    folder, process = held
    process.kill()
    process.wait()
    with writing(folder):
        pass


def test_two_blocks_of_one_process_exclude_each_other(tmp_path):
    with writing(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        with writing(tmp_path):
            pass
    with writing(tmp_path):  # after an error, too
        pass


def test_a_lock_is_not_taken_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="is a symbolic link"), writing(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_patches, write_config):
    """A tiny trained flow."""
    root = tmp_path_factory.mktemp("run")
    make_patches(root / "patches", num=dict.fromkeys("AB", 24))
    cli.main(["train", str(write_config(root)), "train.steps=2", "train.validate_pairs=4"])
    return root / "runs" / "tiny"


def test_a_training_beside_a_training_changes_nothing(run):
    def content() -> dict:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and LOCK not in path.name}

    before = content()
    with writing(run), pytest.raises(SystemExit, match=r"error: .*tiny: process \d+ on .* writes here"):
        cli.main(["train", str(run), "train.steps=4"])
    assert content() == before


def test_a_translation_beside_a_translation_changes_nothing(run, tmp_path):
    """It used to end well, with an empty manifest."""
    out, asked = tmp_path / "out", ["translate", str(run), "translate.num=2", "translate.frames=3"]
    cli.main([*asked, "--output", str(out)])
    before = load_trajectory(out)
    with writing(out), pytest.raises(SystemExit, match=r"error: .*out: process \d+ on .* writes here"):
        cli.main([*asked, "--output", str(out), "--overwrite"])
    assert np.array_equal(load_trajectory(out).frames, before.frames)


def test_a_listed_frame_that_lost_its_content_is_made_again(run, tmp_path):
    out, asked = tmp_path / "out", ["translate", str(run), "translate.num=2", "translate.frames=3"]
    cli.main([*asked, "--output", str(out)])
    before, frames = load_trajectory(out), sorted(out.glob("frames/*/*.png"))
    frames[1].write_bytes(b"")
    frames[-1].write_bytes(frames[-1].read_bytes()[:-20])
    (out / "manifest.csv.7.tmp").write_text("of a process that was killed")
    cli.main([*asked, "--output", str(out)])
    assert np.array_equal(load_trajectory(out).frames, before.frames)
    assert not list(out.rglob("*.tmp"))


def test_weights_that_are_not_finite_are_refused(run, tmp_path):
    newest = checkpoint.latest(run)
    weights = load_file(newest / checkpoint.WEIGHTS)
    name = next(iter(weights))
    weights[name][0] = float("nan")
    for file in newest.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(weights, tmp_path / checkpoint.WEIGHTS)
    with pytest.raises(SystemExit, match=rf"model.safetensors: {name} hold NaN or infinite numbers; train again"):
        cli.main(["translate", str(tmp_path), "translate.num=2"])


def test_images_that_are_not_finite_are_refused():
    frames = torch.zeros(2, 3, 1, 4, 4)
    require_finite(frames, "abc")
    frames[1, 2, 0, 0, 0] = float("inf")
    with pytest.raises(UserError, match=r"c: its images are not finite; lower translate\.guidance"):
        require_finite(frames, "abc")


_RESOURCE = pytest.importorskip("resource", reason="limits of processes are POSIX")


def test_a_limit_on_the_size_of_files_is_a_users_error_that_names_the_file(tmp_path):
    code = "import resource, sys; from pathlib import Path; from cellflux_bridge import cli\n"
    code += "from cellflux_bridge.base.files import replace_text\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    code += "sys.modules['cellflux_bridge.cli.parse'].import_module = lambda name: sys.modules[__name__]\n"
    code += "def run(args): 'does'; replace_text(Path(sys.argv[1]) / 'table.csv', 'x' * 5000)\n"
    code += "cli.main(['video', 'x'])"
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.strip() == f"error: cannot access {tmp_path / 'table.csv'}: {os.strerror(errno.EFBIG)}"
    assert not list(tmp_path.iterdir())


def test_a_map_has_its_place_on_the_disk(tmp_path):
    array = reserved(tmp_path / "a.npy", np.uint8, (1000, 1000))
    assert array.shape == (1000, 1000)
    assert not array.any()
    assert os.stat(tmp_path / "a.npy").st_blocks * 512 >= 1_000_000


def test_what_fails_half_way_leaves_the_old_file(tmp_path):
    replace_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(tmp_path / "a", "new\udcff")
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def pid_of(_) -> int:
    time.sleep(0.05)
    return os.getpid()


def test_workers_end_with_their_killed_process():
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_survival import pid_of\n"
    code += "from cellflux_bridge.base.parallel import in_processes\n"
    code += "for pid in in_processes(pid_of, range(10**6), workers=2, slab=8): print(pid, flush=True)"
    process = in_python(code, os.path.dirname(__file__))
    workers = {int(process.stdout.readline()) for _ in range(16)}
    process.send_signal(signal.SIGKILL)
    process.wait()
    ends = time.monotonic() + 10
    while any(map(_lives, workers)) and time.monotonic() < ends:
        time.sleep(0.05)
    left = list(filter(_lives, workers))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert workers
    assert not left
    assert multiprocessing.active_children() == []


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_where_a_file_should_be_is_refused_and_not_waited_for(tmp_path):
    """A received folder may hold one anywhere; `open` waits for a writer that never comes."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        regular(tmp_path / "pipe")
    readers = {
        "trajectory.json": lambda folder: load_trajectory(folder),
        "model.safetensors": lambda folder: checkpoint.load_weights(folder, torch.nn.Linear(1, 1)),
        "state.pt": checkpoint.load_state,
        "config.yaml": lambda folder: load_config(folder / "config.yaml"),
        "preprocessing.json": lambda folder: Preprocessing.load(folder / "preprocessing.json"),
        "cost.json": read_cost,
        "metrics.json": lambda folder: reading.read(folder / "metrics.json", reading.Metrics),
        "without.txt": lambda folder: left_out(
            DataConfig(root=folder, layout="folder", without=folder / "without.txt")
        ),
        "a.png": lambda folder: read_rgb(folder / "a.png"),
        "a.npy": lambda folder: read_size(folder / "a.npy"),
    }
    for name, read in readers.items():
        os.mkfifo(tmp_path / name)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(5)
        try:
            with pytest.raises(UserError, match=rf"{name}.*no regular file"):
                read(tmp_path)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
