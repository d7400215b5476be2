"""The console command: its help needs nothing heavy, its way from patches to figures works, its exits are clean."""

import errno
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from cellflux_bridge import cli
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli.parse import COMMANDS
from cellflux_bridge.config import load_config

ROOT = Path(__file__).parents[1]
COMMANDS = tuple(COMMANDS)
SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in ("train", "eval") for path in (ROOT / folder).glob("*.py"))


def test_help_needs_no_torch():
    program = f"""
import sys
from cellflux_bridge import cli
from cellflux_bridge.cli.parse import COMMANDS
for arguments in [["--help"], ["--version"], *([command, "--help"] for command in {COMMANDS!r})]:
    try:
        cli.main(arguments)
    except SystemExit as end:
        assert end.code == 0, (arguments, end.code)
heavy = [name for name in ("torch", "numpy", "timm", "sklearn", "lightning_fabric") if name in sys.modules]
assert not heavy, heavy
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", finished.stdout, re.MULTILINE), command
        assert f"usage: cellflux-bridge {command}" in finished.stdout


def test_the_console_command_is_this_main():
    (command,) = entry_points(group="console_scripts", name="cellflux-bridge")
    assert command.load() is cli.main


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_commands(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 0
    program = Path(script).name if "benchmark" in script else "cellflux-bridge"  # benchmarks are no commands
    assert f"usage: {program}" in capsys.readouterr().out


def test_no_command_prints_the_usage_and_fails(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2
    assert "commands:" in capsys.readouterr().out


def test_a_users_mistake_ends_with_its_message_and_status_1(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-m", "cellflux_bridge.cli", "config", "show", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"error: {tmp_path / 'none.yaml'}: cannot read this configuration")
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "x.yaml"], "unknown command 'trian'; did you mean 'train'.; known: data, config, run, train"),
        (["train", "x.yaml", "--data.root=y"], "--data.root=y: settings are written without dashes, as in data.root=y"),
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot read"),
        (["translate", "nowhere"], "nowhere: holds no checkpoint"),
        (["video", "nowhere"], r"nowhere: no trajectory\.json here"),
        (["classify", "nowhere", "--classifier", "elsewhere"], r"nowhere: no trajectory\.json here"),
    ],
)
def test_wrong_words_are_errors(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        cli.main(arguments)


def test_signals_and_full_disks_end_without_a_traceback(monkeypatch, capsys):
    def end_with(error):
        def raising(where, overrides):
            raise error

        monkeypatch.setattr("cellflux_bridge.cli.config.configuration", raising)
        with pytest.raises(SystemExit) as end:
            cli.main(["config", "show", "x.yaml"])
        return end.value.code

    assert end_with(KeyboardInterrupt()) == 130
    assert "interrupted" in capsys.readouterr().err
    full = OSError(errno.ENOSPC, "No space left on device", "runs/x")
    assert end_with(full) == "error: cannot access runs/x: No space left on device"
    assert end_with(UserError("data.root: no")) == "error: data.root: no"
    with pytest.raises(ZeroDivisionError):  # a fault of the program keeps its traceback
        end_with(ZeroDivisionError())


def test_config_show_fills_in_and_overrides(tmp_path, write_config, capsys):
    file = write_config(tmp_path)
    cli.main(["config", "show", str(file), "train.lr=1e-4", "path=brownian", "path.scale=0.3"])
    shown = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(shown)
    config = load_config(tmp_path / "shown.yaml")
    assert config == load_config(file, ["train.lr=1e-4", "path=brownian", "path.scale=0.3"])
    assert config.train.lr == 1e-4
    assert config.path == {"name": "brownian", "scale": 0.3, "margin": 0.02}
    cli.main(["config", "show", str(file), "--key", "train.batch_size"])
    assert capsys.readouterr().out == "8\n"
    cli.main(["config", "show", str(file), "--key", "data.split"])
    assert capsys.readouterr().out == "val: 0.1\ntest: 0.2\ntrain_groups: null\nunseen: []\n"
    with pytest.raises(SystemExit, match=r"train\.bath_size: no such key"):
        cli.main(["config", "show", str(file), "--key", "train.bath_size"])
    with pytest.raises(SystemExit, match=r"train\.bath_size: unknown key; did you mean 'train\.batch_size'"):
        cli.main(["config", "show", str(file), "train.bath_size=3"])


def test_from_patches_to_figures(patch_folder, tmp_path, write_config, capsys):
    judge = {"train": {"steps": 20, "batch_size": 16, "lr": 3e-3, "warmup_steps": 0, "ema_decay": 0.5}}
    file = str(write_config(tmp_path, data={"split": {"val": 0.2, "test": 0.4}}, classifier=judge))
    run = tmp_path / "runs" / "tiny"

    cli.main(["data", "check", file])
    assert re.search(r"\bA\b", capsys.readouterr().out)
    assert (run / "contact_sheet.png").exists()

    cli.main(["train", file, "train.sample_every=2", "train.validate_pairs=8"])
    printed = capsys.readouterr().out
    assert f"trained: {run / 'checkpoints' / 'step-00000004'}" in printed
    assert "val/velocity_mse" in printed
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]

    with pytest.raises(SystemExit, match="holds no sequences yet"):
        cli.main(["video", str(run)])
    options = ["translate.num=4", "translate.steps=4", "translate.frames=3", "translate.batch_size=3"]
    cli.main(["translate", str(run), "--source", "A", "--target", "B", *options])
    folder = run / "trajectories" / "A_to_B_path"
    assert f"sequences: {folder} (4, 4 made now" in capsys.readouterr().out
    cli.main(["translate", str(run), "--source", "A", "--target", "B", *options])
    assert "(4, 0 made now)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"what differs: translate\.steps \(4 there, 5 here\)"):
        cli.main(["translate", str(run), *options, "translate.steps=5"])
    cli.main(["translate", str(run), *options, "translate.steps=5", "--overwrite"])
    assert "(4, 4 made now" in capsys.readouterr().out

    for where in (run, folder):
        cli.main(
            ["video", str(where), "video.formats=[strip, gif]", "video.tile=16", "--output", str(tmp_path / "shown")]
        )
        wrote = [line.removeprefix("wrote: ") for line in capsys.readouterr().out.splitlines()]
        assert len(wrote) == 2
        assert all(Path(path).stat().st_size > 100 for path in wrote)

    cli.main(["translate", str(run), *options, "translate.frames=5", "--output", str(run / "trajectories" / "more")])
    capsys.readouterr()
    cli.main(["video", str(run), "video.formats=[strip]", "--output", str(tmp_path / "shown")])
    assert f"newest translation, {run / 'trajectories' / 'more'}; to choose another (A_to_B_path)" in (
        capsys.readouterr().out
    )
    shutil.rmtree(run / "trajectories" / "more")

    with pytest.raises(SystemExit, match="none given, and the run has none"):
        cli.main(["classify", str(run)])
    for view in ("rgb", "grey"):
        cli.main(["train-classifier", file, "classifier.train.accelerator=cpu", f"classifier.view={view}"])
        assert "test/colour_only_balanced_accuracy" in capsys.readouterr().out
    cli.main(["classify", str(run)])
    printed = capsys.readouterr().out
    assert f"{run / 'judge_rgb'}: rgb, accuracy 1.000 on" in printed
    assert f"{run / 'judge_grey'}: grey" in printed
    assert printed.count("fraction called B of 4 sequences") == 2
    assert re.search(r"untranslated A +0\.000\n +Reinhard colour transfer +1\.000", printed)
    cli.main(["classify", str(folder), "--classifier", str(run / "judge_grey")])
    assert capsys.readouterr().out.count("fraction called") == 1
    guide = ["classifier.train.accelerator=cpu", "classifier.role=guide", "classifier.train.steps=2"]
    cli.main(["train-classifier", file, *guide])
    cli.main(["train-classifier", file, *guide, "classifier.sees=state", "pairs.identity=true"])
    printed = capsys.readouterr().out
    assert f"trained: {run / 'guide_rgb' / 'checkpoints'}" in printed
    assert f"trained: {run / 'guide_rgb_state' / 'checkpoints'}" in printed
    assert "test/accuracy_at_t0.5" in printed
    cli.main(["classify", str(run)])  # its judges, not its guides
    assert capsys.readouterr().out.count("fraction called") == 2
    for name in ("guide_rgb", "guide_rgb_state"):
        with pytest.raises(SystemExit, match=rf"{name}/.*: is a guide .*classifier\.role=judge"):
            cli.main(["classify", str(run), "--classifier", str(run / name)])


def test_a_classifier_trains_further_and_keeps_to_its_run(patch_folder, tmp_path, write_config, capsys):
    file = str(write_config(tmp_path, classifier={"train": {"batch_size": 8, "accelerator": "cpu"}}))

    def train(*overrides):
        cli.main(["train-classifier", file, *overrides])
        return re.search(r"trained: (.*)", capsys.readouterr().out).group(1)

    assert train("classifier.train.steps=2").endswith("step-00000002")
    assert train("classifier.train.steps=4", "train.lr=0.5", "path=straight").endswith("step-00000004")
    with pytest.raises(SystemExit, match=r"differ in classifier\.jitter"):
        train("classifier.train.steps=5", "classifier.jitter=0.3")
    with pytest.raises(SystemExit, match=r"differ in classifier\.train\.lr"):
        train("classifier.train.steps=5", "classifier.train.lr=0.5")


def test_a_flow_trains_on_cross_fitted_levels(patch_folder, tmp_path, write_config, capsys):
    section = {"train": {"steps": 2, "batch_size": 8, "accelerator": "cpu"}, "folds": 2}
    condition = {"target": "level", "level": "crossfit"}
    split = {"split": {"val": 0.2, "test": 0.2}}
    file = str(write_config(tmp_path, classifier=section, condition=condition, data=split))
    run = tmp_path / "runs" / "tiny"
    cli.main(["train", file, "train.steps=1", "train.validate_pairs=8"])
    assert "CPU minutes of cross-fitting; out of fold" in capsys.readouterr().out
    assert {path.name for path in run.iterdir()} >= {"levels.csv", "levels.json", "crossfit", "checkpoints"}
    cli.main(["train", file, "train.steps=2", "train.validate_pairs=8"])  # goes on with the levels that are there
    # A guide of states meets the pairs of the flow, which the same levels decide.
    cli.main(["train-classifier", file, "classifier.role=guide", "classifier.sees=state"])
    assert "cross-fitting" not in capsys.readouterr().out


def test_frames_of_ones_own_take_video_settings_from_the_command_line(patch_folder, tmp_path, write_config):
    file = write_config(tmp_path, data={"split": {"val": 0.2, "test": 0.4}})
    cli.main(["train", str(file), "train.steps=1", "train.validate_pairs=8"])
    cli.main(["translate", str(tmp_path / "runs/tiny"), "translate.num=1", "translate.steps=2", "translate.frames=3"])
    folder = tmp_path / "runs" / "tiny" / "trajectories" / "A_to_B_path"
    (folder / "config.yaml").unlink()
    cli.main(["video", str(folder), "video.formats=[gif]", "video.tile=16"])
    assert list(folder.glob("*.gif"))
    with pytest.raises(SystemExit, match=r"video\.fsp: unknown key; did you mean 'video\.fps'"):
        cli.main(["video", str(folder), "video.fsp=3"])


def test_a_training_that_takes_patches_from_a_named_split_says_so(tmp_path, make_patches, write_config, capsys):
    for split, count in (("train", 16), ("val", 8)):
        make_patches(tmp_path / "patches" / split, num={"A": count, "B": count})
    file = str(write_config(tmp_path, train={"steps": 1, "validate_pairs": 8}))
    cli.main(["train", file])
    assert capsys.readouterr().out.count("the data names 32 patches train and none test: of these 8 test") == 1
    cli.main(["train-classifier", file, "classifier.train.steps=1"])
    assert "the data names" not in capsys.readouterr().out  # it was said when the run was begun


def test_run_does_it_all_and_goes_on_where_it_was(patch_folder, tmp_path, write_config, capsys, monkeypatch):
    monkeypatch.setattr("cellflux_bridge.metrics.nuclei.scale_factor", lambda *_, **__: 1.0)  # a quarter of the time
    classifier = {"train": {"steps": 8, "batch_size": 16, "lr": 3e-3, "warmup_steps": 0, "ema_decay": 0.5}}
    data = {"split": {"val": 0.2, "test": 0.4}}
    translate = {"method": "progression", "levels": 2, "steps": 1, "num": 4, "calibrate": "none", "source": "A"}
    condition = {"target": "level", "level": "class", "source_image": True, "source_class": False}
    path = {"name": "noised_source", "scale": 0.7}
    extra = {"translate": {**translate, "target": "B"}, "condition": condition, "path": path, "train": {"steps": 2}}
    file, run = str(write_config(tmp_path, data=data, classifier=classifier, **extra)), tmp_path / "runs" / "tiny"

    cli.main(["run", file, "--dry-run"])
    assert re.findall(r"^\[(\d+) of 11\] ", capsys.readouterr().out, re.MULTILINE) == [str(n) for n in range(1, 12)]
    assert not run.exists()
    cli.main(["run", file])
    printed = capsys.readouterr().out  # no third classifier, because the network finds what it takes for nuclei
    assert re.findall(r"^\[(\d+) of 10, after \d+:\d\d\] ", printed, re.MULTILINE) == [str(n) for n in range(1, 11)]
    assert f"open in a browser: {run / 'report.html'}" in printed
    metrics = json.loads((run / "metrics.json").read_text())
    assert [network["name"] for network in metrics["networks"]][2:] == ["nuclei"]
    made = {path: path.stat().st_mtime_ns for path in run.glob("**/model.safetensors")}
    assert len(made) == 4
    cli.main(["run", file])
    assert {path: path.stat().st_mtime_ns for path in run.glob("**/model.safetensors")} == made
    assert "(4, 0 made now)" in capsys.readouterr().out


def test_run_asks_for_its_classes_before_it_trains(patch_folder, tmp_path, write_config):
    file = str(write_config(tmp_path))
    with pytest.raises(SystemExit, match=r"translate\.target: no class 'b' here; expected one of A, B"):
        cli.main(["run", file, "translate.target=b"])
    for ends in (["translate.target=B"], ["translate.source=A", "translate.target=A"]):
        with pytest.raises(
            SystemExit, match=r"translate\.target=.: name two classes, or, of two, neither; they are A, B"
        ):
            cli.main(["run", file, *ends])
    with pytest.raises(SystemExit, match=r"form=sharpen: asks a guide of states, which run does not train"):
        cli.main(["run", file, "translate.guidance.form=sharpen"])
    shutil.copytree(patch_folder / "B", patch_folder / "C")
    with pytest.raises(SystemExit, match=r"translate\.source: not named; expected one of A, B, C"):
        cli.main(["run", file])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("several", ["train.devices=2", "train.num_nodes=2", "WORLD_SIZE=2"])
def test_run_is_of_one_process(several, tmp_path, write_config, monkeypatch):
    overrides = [several] if several.startswith("train") else []
    if not overrides:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        SystemExit, match=r"run: works in one process .* train, train-classifier, translate, video, class"
    ):
        cli.main(["run", str(write_config(tmp_path)), *overrides])


def test_data_that_cannot_be_used_fails_the_check(patch_folder, tmp_path, write_config, capsys):
    (patch_folder / "A" / "broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="some files cannot be used"):
        cli.main(["data", "check", file := str(write_config(tmp_path))])
    listed = tmp_path / "runs" / "tiny" / "unusable.txt"
    assert listed.read_text() == "A/broken.png\n"
    assert f"to go on without them set data.without={listed}" in capsys.readouterr().out
    cli.main(["data", "check", file, f"data.without={listed}"])
    assert "left out by data.without: 1 patches" in capsys.readouterr().out

    (patch_folder / "B" / "broken.png").write_bytes(b"no image")  # the list grows
    with pytest.raises(SystemExit, match="some files cannot be used"):
        cli.main(["data", "check", file, f"data.without={listed}"])
    assert listed.read_text() == "A/broken.png\nB/broken.png\n"
    cli.main(["data", "check", file, f"data.without={listed}"])
    for name in "AB":
        (patch_folder / name / "broken.png").unlink()
    cli.main(["data", "check", file])
    assert not listed.exists()  # it would leave out what was mended
    listed.write_text("A/brokn.png\n")
    with pytest.raises(SystemExit, match=r"data\.without: .*unusable\.txt: A/brokn\.png: no patch of"):
        cli.main(["data", "check", file, f"data.without={listed}"])
    with pytest.raises(SystemExit, match=r"data\.without: nowhere\.txt: cannot be read"):
        cli.main(["data", "check", file, "data.without=nowhere.txt"])


def test_the_shell_scripts_install_what_they_say_whatever_their_arguments(tmp_path):
    """A sourced setup.sh sees the arguments of the script that sources it; none of them may reach pip."""
    root = Path(__file__).parents[1]
    log, fake = tmp_path / "calls.txt", tmp_path / "env" / "bin"
    fake.mkdir(parents=True)
    for name in ("python", "cellflux-bridge"):
        (fake / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\n')
        (fake / name).chmod(0o755)
    environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path / "env"), "PATH": f"{fake}:{os.environ['PATH']}"}
    for script, extra in (("example.sh", ""), ("tests/run.sh", "[dev]")):
        log.write_text("")
        arguments = ["configs/own.yaml", "data.root=here"] if script == "example.sh" else ["-k", "path"]
        subprocess.run(["bash", str(root / script), *arguments], env=environment, check=True, capture_output=True)
        calls = log.read_text().splitlines()
        assert f"python -m pip install --quiet -e {root}{extra}" in calls
    assert any(call.startswith("python -m pytest ") and call.endswith(" -k path") for call in calls)
