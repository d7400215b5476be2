"""Training: a resumed run repeats an uninterrupted one, whatever stopped it, and its figures mean what they say."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

from cellflux_bridge import checkpoint, cli, images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.parallel import prefetch
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.flow.task import FlowTask, build_flow, ignores_condition
from cellflux_bridge.training import loop
from cellflux_bridge.training.loop import Stopped, fit, make_fabric
from cellflux_bridge.training.run import Log, differences
from cellflux_bridge.training.settings import TrainConfig
from cellflux_bridge.training.state import EMA, Spent

# Dropout, accumulation and a warm-up, so that everything a resume could forget is there.
DEMANDING = {
    "velocity": {"dropout": 0.2},
    "train": {"accumulate": 2, "batch_size": 4, "warmup_steps": 5, "validate_pairs": 8, "log_every": 1},
}


@pytest.fixture
def demanding(patch_folder, tmp_path, write_config) -> Path:
    return write_config(tmp_path, **DEMANDING)


def train(file: Path, output: Path, *overrides: str) -> Path:
    """Train through the command line and return the newest checkpoint."""
    cli.main(["train", str(file), f"output={output}", *overrides])
    return checkpoint.latest(output)


def resolved(file: Path, *overrides: str):
    config = load_config(file, overrides)
    patches = load_patches(config.data, seed=config.seed)
    data = config.data.model_copy(update={"classes": list(patches.classes)})
    return config.model_copy(update={"data": data}), patches


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    """EMA weights, raw weights and optimiser equal bit for bit."""
    assert found.name == expected.name
    for name, tensor in load_file(expected / "model.safetensors").items():
        assert torch.equal(tensor, load_file(found / "model.safetensors")[name]), name
    one, two = checkpoint.load_state(found), checkpoint.load_state(expected)
    assert one["step"] == two["step"]
    assert all(torch.equal(tensor, one["model"][name]) for name, tensor in two["model"].items())
    assert one["optimiser"]["param_groups"] == two["optimiser"]["param_groups"]
    for number, state in two["optimiser"]["state"].items():
        found = one["optimiser"]["state"][number]
        assert all(torch.equal(*map(torch.as_tensor, (value, found[key]))) for key, value in state.items())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    rows = [row for row in metrics(folder) if "loss" in row]
    assert len({row["step"] for row in rows}) == len(rows), "a step was logged twice"
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_patches, write_config) -> Path:
    """A run of nine updates that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    make_patches(folder / "patches")
    train(write_config(folder, **DEMANDING), folder / "run", "train.steps=9")
    return folder / "run"


def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(demanding, tmp_path, whole):
    train(demanding, tmp_path / "parts", "train.steps=4")
    resumed = train(demanding, tmp_path / "parts", "train.steps=9")
    assert_same_checkpoint(resumed, checkpoint.latest(whole))
    assert losses(tmp_path / "parts") == losses(whole)
    assert [path.name for path in resumed.parent.iterdir()] == ["step-00000009"]


def test_a_crash_between_checkpoints_goes_on_from_the_last_one(demanding, tmp_path, monkeypatch, whole):
    batch = FlowTask.batch

    def crashing(self, index, *, rank):
        if index == 2 * 7 + 1:
            raise RuntimeError("power cut")
        return batch(self, index, rank=rank)

    monkeypatch.setattr(FlowTask, "batch", crashing)
    with pytest.raises(RuntimeError, match="power cut"):
        train(demanding, tmp_path / "parts", "train.steps=9", "train.checkpoint_every=4")
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path / "parts").name == "step-00000004"
    assert max(losses(tmp_path / "parts")) == 7
    assert_same_checkpoint(train(demanding, tmp_path / "parts", "train.steps=9"), checkpoint.latest(whole))
    assert losses(tmp_path / "parts") == losses(whole)


def test_a_kill_in_the_middle_of_writing_leaves_a_resumable_run(demanding, tmp_path, whole):
    run = tmp_path / "parts"
    newest = train(demanding, run, "train.steps=4")
    # What a kill can leave: a half-written checkpoint, an older one half removed, a log line cut short.
    shutil.copytree(newest, run / "checkpoints" / "step-00000006.tmp")
    (run / "checkpoints" / "step-00000006.tmp" / "state.pt").write_bytes(b"half")
    shutil.copytree(newest, run / "checkpoints" / "step-00000002")
    (run / "checkpoints" / "step-00000002" / "model.safetensors").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    assert checkpoint.latest(run) == newest
    assert_same_checkpoint(train(demanding, run, "train.steps=9"), checkpoint.latest(whole))
    assert losses(run) == losses(whole)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000009"]


def test_a_stop_between_cross_fitting_and_the_flow_changes_nothing(patch_folder, tmp_path, write_config, monkeypatch):
    """What the folds drew must not reach the flow's first weights: a run that finds its levels made has none of it."""
    classifiers = {"folds": 2, "train": {"steps": 2, "batch_size": 8, "accelerator": "cpu"}}
    condition = {"target": "level", "level": "crossfit"}
    file = write_config(tmp_path, **DEMANDING, condition=condition, classifier=classifiers)
    whole = train(file, tmp_path / "whole", "train.steps=2")

    def failing(self, index, *, rank):
        raise RuntimeError("power cut")

    monkeypatch.setattr(FlowTask, "batch", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        train(file, tmp_path / "parts", "train.steps=2")
    monkeypatch.undo()
    assert (tmp_path / "parts" / "levels.csv").read_text() == (tmp_path / "whole" / "levels.csv").read_text()
    assert_same_checkpoint(train(file, tmp_path / "parts", "train.steps=2"), whole)


def start_training(file: Path, output: Path, *overrides: str) -> subprocess.Popen:
    """`train` in a process of its own, returned once it has stepped."""
    command = [sys.executable, "-m", "cellflux_bridge.cli", "train", str(file), f"output={output}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or len((output / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_ctrl_c_saves_exits_with_130_and_is_resumed_to_the_same_result(demanding, tmp_path):
    run = tmp_path / "parts"
    process = start_training(demanding, run, "train.steps=100000", "train.checkpoint_every=100000")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by SIGINT after step" in errors
    assert "Traceback" not in errors
    stopped = checkpoint.step_of(checkpoint.latest(run))
    assert stopped >= 3
    steps = f"train.steps={stopped + 3}"
    assert_same_checkpoint(train(demanding, run, steps), train(demanding, tmp_path / "whole", steps))
    assert losses(run) == losses(tmp_path / "whole")


def test_sigkill_leaves_a_resumable_run(demanding, tmp_path):
    run = tmp_path / "parts"
    process = start_training(demanding, run, "train.steps=100000", "train.checkpoint_every=1")
    process.kill()
    process.communicate(timeout=60)
    steps = f"train.steps={checkpoint.step_of(checkpoint.latest(run)) + 3}"
    assert_same_checkpoint(train(demanding, run, steps), train(demanding, tmp_path / "whole", steps))
    assert losses(run) == losses(tmp_path / "whole")


# With a task of a few numbers


class Line:
    """Regression of a line; `change` may alter the loss of an update."""

    def __init__(self, change=None):
        torch.manual_seed(0)
        self.model, self.preprocessing = nn.Linear(2, 1), Preprocessing(16)
        self._change, self.updates, self.seen = change or (lambda loss, update: loss), 0, []

    def batch(self, index, *, rank):
        generator = torch.Generator().manual_seed(index + 1000 * rank)
        return {"x": torch.randn(8, 2, generator=generator)}

    def loss(self, model, batch):
        self.updates += 1
        self.seen.append(batch["x"].dtype)
        return self._change((model(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean(), self.updates)

    def validate(self, model, device):
        return {"val/weight": model.weight.sum().item()}

    def sheet(self, model, device):
        return None


@pytest.fixture
def config(tmp_path, write_config):
    return load_config(write_config(tmp_path), ["train.log_every=1", "data.classes=[A, B]"])


def fit_line(task, config, folder: Path, **train) -> Path:
    folder.mkdir(exist_ok=True)
    settings = config.train.model_copy(update=train)
    return fit(task, config, settings, folder=folder, fabric=make_fabric(settings))


@pytest.mark.parametrize("every", [1, 4])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(config, tmp_path, every):
    task = Line(lambda loss, update: loss * (float("nan") if update == 6 else 1))
    with pytest.raises(UserError, match=r"not finite.*lower train\.lr.*step-00000004"):
        fit_line(task, config, tmp_path / "run", steps=10, checkpoint_every=2, log_every=every)
    assert checkpoint.latest(tmp_path / "run").name == "step-00000004"
    assert all(
        tensor.isfinite().all()
        for tensor in checkpoint.load_state(tmp_path / "run/checkpoints/step-00000004")["model"].values()
    )


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_infinite_gradient_of_a_finite_loss_is_never_saved(config, tmp_path, clip):
    task = Line(lambda loss, update: _InfiniteGradient.apply(loss) if update == 6 else loss)
    with pytest.raises(UserError, match=r"not finite.*step-00000004"):
        fit_line(task, config, tmp_path / "run", steps=10, checkpoint_every=2, gradient_clip=clip)
    assert checkpoint.latest(tmp_path / "run").name == "step-00000004"


def test_without_a_checkpoint_a_loss_that_is_not_finite_says_so(config, tmp_path):
    with pytest.raises(UserError, match="No checkpoint had been written"):
        fit_line(Line(lambda loss, update: loss * float("inf")), config, tmp_path / "run", steps=3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_after_its_update(config, tmp_path, number, code):
    def interrupt(loss, update):
        if update == 3:
            os.kill(os.getpid(), number)
        return loss

    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        fit_line(Line(interrupt), config, tmp_path / "run", steps=10)
    assert stopped.value.code == code
    assert signal.getsignal(number) is before
    assert checkpoint.latest(tmp_path / "run").name == "step-00000003"
    fit_line(Line(), config, tmp_path / "whole", steps=6)
    assert_same_checkpoint(fit_line(Line(), config, tmp_path / "run", steps=6), checkpoint.latest(tmp_path / "whole"))


@pytest.fixture
def pythons_own_ctrl_c():
    """A browser that an earlier test drove leaves a handler of its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("pythons_own_ctrl_c")
def test_one_ctrl_c_that_arrives_twice_still_saves(config, tmp_path, monkeypatch):
    def interrupt(loss, update):
        if update == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    with pytest.raises(Stopped):
        fit_line(Line(interrupt), config, tmp_path / "run", steps=10)
    assert checkpoint.latest(tmp_path / "run").name == "step-00000003"
    monkeypatch.setattr("cellflux_bridge.training.loop._ONE_KEYPRESS", -1.0)  # as if the first were long ago
    with pytest.raises(KeyboardInterrupt):
        fit_line(Line(interrupt), config, tmp_path / "impatient", steps=10)
    assert not (tmp_path / "impatient" / "checkpoints").exists()


def test_accumulation_is_a_larger_batch(config, tmp_path):
    class Joined(Line):
        def batch(self, index, *, rank):
            parts = [Line.batch(self, 2 * index + micro, rank=rank)["x"] for micro in range(2)]
            return {"x": torch.cat(parts)}

    one = fit_line(Line(), config, tmp_path / "accumulated", steps=4, accumulate=2)
    two = fit_line(Joined(), config, tmp_path / "joined", steps=4)
    logged = [
        [(r["loss"], r["gradient_norm"]) for r in metrics(tmp_path / n) if "loss" in r]
        for n in ("accumulated", "joined")
    ]
    assert logged[0] == [pytest.approx(row, rel=1e-5) for row in logged[1]]  # Adam alone would hide a factor
    for name, tensor in load_file(two / "model.safetensors").items():
        torch.testing.assert_close(load_file(one / "model.safetensors")[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_warms_up_and_gradients_are_clipped(config, tmp_path):
    fit_line(Line(), config, tmp_path / "run", steps=6, warmup_steps=4, lr=0.1, gradient_clip=1e-12, weight_decay=0.0)
    rates = [row["lr"] for row in metrics(tmp_path / "run") if "lr" in row]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert all(row["gradient_norm"] > 0.1 for row in metrics(tmp_path / "run") if "lr" in row)


def test_small_rates_are_logged_and_images_are_counted_since_the_last_line(config, tmp_path):
    def slow_once(loss, update):
        time.sleep(0.4 if update == 1 else 0.0)
        return loss

    class SlowToValidate(Line):
        def validate(self, model, device):
            time.sleep(1.0)
            return super().validate(model, device)

    settings = {"steps": 6, "log_every": 3, "lr": 1.23456789e-7, "batch_size": 8, "validate_every": 3}
    fit_line(SlowToValidate(slow_once), config, tmp_path / "run", **settings)
    rows = [row for row in metrics(tmp_path / "run") if "lr" in row]
    assert [row["lr"] for row in rows] == [1.23457e-7] * 2
    assert rows[0]["images_per_second"] < 8 * 3 / 0.4
    assert rows[1]["images_per_second"] > 8 * 3 / 0.9  # without the time of the validation


@pytest.mark.parametrize("limit", ["max_minutes", "max_cpu_minutes"])
def test_time_ends_training_and_more_time_goes_on(config, tmp_path, capsys, limit):
    run = tmp_path / "run"
    assert fit_line(Line(), config, run, steps=10, **{limit: 1e-9}).name == "step-00000001"
    assert fit_line(Line(), config, run, steps=10, **{limit: 1e-9}).name == "step-00000001"
    assert "trained already" in capsys.readouterr().out
    resumed = fit_line(Line(), config, run, steps=10, **{limit: 5.0})
    assert_same_checkpoint(resumed, fit_line(Line(), config, tmp_path / "whole", steps=10))


def test_processor_time_is_not_the_clocks_and_adds_up_over_parts(config, tmp_path):
    """A wait costs seconds and no processor time; a sum over two steps outlasts the stop between them."""

    def waiting(loss, update):
        time.sleep(0.3)
        return loss

    def working(loss, update):
        began = time.process_time()
        while time.process_time() - began < 0.3:
            pass
        return loss

    run = tmp_path / "run"
    spent = [checkpoint.load_state(fit_line(Line(waiting), config, run, steps=2, max_cpu_minutes=0.4 / 60))]
    assert spent[0]["step"] == 2
    assert spent[0]["seconds"] > 0.6
    assert spent[0]["cpu_seconds"] < 0.3
    spent.append(checkpoint.load_state(fit_line(Line(working), config, run, steps=10, max_cpu_minutes=0.4 / 60)))
    assert 3 <= spent[1]["step"] <= 4
    assert 0.4 <= spent[1]["cpu_seconds"] < 1.5
    logged = [row["cpu_seconds"] for row in metrics(run) if "loss" in row]
    assert logged == sorted(logged)


def test_a_finished_run_is_left_as_it_is(config, tmp_path):
    newest = fit_line(Line(), config, tmp_path / "run", steps=4)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert fit_line(Line(), config, tmp_path / "run", steps=4) == newest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["other network", "without a step", "too large"])
def test_a_state_that_is_not_this_trainings_is_refused(config, tmp_path, damage):
    path = fit_line(Line(), config, tmp_path / "run", steps=2) / "state.pt"
    state = torch.load(path, weights_only=True)
    if damage == "other network":
        state["model"]["weight"] = torch.zeros(7, 2)
    elif damage == "without a step":
        del state["step"]
    else:
        state["more"] = torch.zeros(2_000_000)
    torch.save(state, path)
    expected = r"expected at most 2,\d" if damage == "too large" else "not the state of this training"
    with pytest.raises(UserError, match=rf"step-00000002/state\.pt: .*{expected}"):
        fit_line(Line(), config, tmp_path / "run", steps=4)


def test_checkpoints_are_kept_by_number(config, tmp_path):
    fit_line(Line(), config, tmp_path / "run", steps=10, checkpoint_every=2, keep_checkpoints=3)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000008", "step-00000010"]


def test_validation_sees_the_averaged_weights(config, tmp_path):
    newest = fit_line(Line(), config, tmp_path / "run", steps=5, lr=0.1)
    logged = next(row["val/weight"] for row in metrics(tmp_path / "run") if "val/weight" in row)
    assert logged == pytest.approx(load_file(newest / "model.safetensors")["weight"].sum().item(), abs=1e-5)
    raw = checkpoint.load_state(newest)["model"]["weight"].sum().item()
    assert abs(logged - raw) > 1e-3


def test_the_log_drops_what_a_resume_will_repeat(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"st'
    )
    Log(tmp_path, from_step=2, tensorboard=False).write(3, {"loss": 0.5})
    assert metrics(tmp_path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}, {"step": 3, "loss": 0.5}]


def test_batches_made_ahead_come_in_order_and_no_more_are_begun_than_asked_for():
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.002 * (number % 3))
        return number

    assert list(prefetch(work, range(20), num=4)) == list(range(20))
    begun.clear()
    with closing(prefetch(work, range(20), num=4)) as upcoming:
        assert [next(upcoming) for _ in range(3)] == [0, 1, 2]
    assert max(begun) <= 2 + 4


# Exponential moving average


def test_the_average_follows_its_closed_form():
    decay, model = 0.6, nn.Linear(1, 1, bias=False)
    ema = EMA(model, decay)
    values = torch.linspace(-1, 2, 12).tolist()
    for value in values:
        nn.init.constant_(model.weight, value)
        ema.update(model)
    # Update n >= 1 moves by 1 - d_n, d_n = min(decay, (1 + n) / (10 + n)); update 0 takes the first value.
    factors = [min(decay, (1 + n) / (10 + n)) for n in range(len(values))]
    weights = [1 - d for d in factors]
    weights[0] = 1.0
    for n in range(len(values)):
        for later in factors[n + 1 :]:
            weights[n] *= later
    assert sum(weights) == pytest.approx(1)
    expected = sum(w * v for w, v in zip(weights, values, strict=True))
    assert ema.module.weight.item() == pytest.approx(expected, abs=1e-6)


def test_the_average_copies_buffers_and_forgets_at_decay_zero():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(model, 0.0)
    for _ in range(3):
        nn.init.normal_(model[0].weight)
        model(torch.randn(8, 2))
        ema.update(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(ema.module.state_dict()[name], tensor)


def test_the_average_is_bit_for_bit_torchs_also_where_it_is_taken_up_again():
    def update(averages, values, n):
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - min(0.5, (1 + int(n)) / (10 + int(n))))
        else:
            torch._foreach_copy_(averages, values)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    expected = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    ema = EMA(model, 0.5)
    for step in range(15):
        nn.init.normal_(model[0].weight)
        model(torch.randn(2, 3, 8, 8))
        expected.update_parameters(model)
        if step == 7:
            resumed = EMA(ema.module, 0.5)
            resumed.num_updates, ema = step, resumed
        ema.update(model)
        for name, tensor in expected.module.state_dict().items():
            assert torch.equal(ema.module.state_dict()[name], tensor)


# The folder of a run


def test_a_folder_that_holds_another_run_is_refused_by_its_keys(demanding, tmp_path, capsys):
    run = tmp_path / "run"
    train(demanding, run, "train.steps=2")
    for override, key in (("train.lr=0.5", r"train\.lr"), ("path.scale=0.9", r"path\.scale"), ("seed=3", "seed")):
        with pytest.raises(SystemExit, match=rf"holds another run; they differ in {key} \(.* there, .* here\)"):
            train(demanding, run, "train.steps=3", override)
    assert checkpoint.latest(run).name == "step-00000002"
    saved = load_config(run / "config.yaml")
    assert (saved.seed, saved.train.steps) == (0, 2)
    more = ("train.steps=3", "translate.num=5", "classifier.view=grey", "train.log_every=2", "video.fps=5")
    assert train(demanding, run, *more).name == "step-00000003"
    assert load_config(run / "config.yaml").translate.num == 5


def test_a_run_goes_on_from_its_own_folder(demanding, tmp_path):
    train(demanding, tmp_path / "run", "train.steps=2")
    cli.main(["train", str(tmp_path / "run"), "train.steps=4"])
    assert_same_checkpoint(checkpoint.latest(tmp_path / "run"), train(demanding, tmp_path / "whole", "train.steps=4"))


def test_moved_patches_and_another_number_of_logged_pairs_are_the_same_run(tmp_path, write_config):
    """Where validation pairs set a classifier's temperatures their number is no mere figure in the log."""
    file = write_config(tmp_path)

    def differing(override: str) -> list[str]:
        return differences(load_config(file), load_config(file, [override]))

    same = ["data.root=moved", *(f"{key}.validate_pairs=8" for key in ("train", "ddim.denoiser.train"))]
    assert not any(differing(override) for override in same)
    assert differing("classifier.train.validate_pairs=8") == ["classifier.train.validate_pairs (256 there, 8 here)"]


def test_resume_never_refuses_a_run(demanding, tmp_path):
    train(demanding, tmp_path / "run", "train.steps=2", "train.resume=never")
    with pytest.raises(SystemExit, match="holds a run already"):
        train(demanding, tmp_path / "run", "train.steps=3", "train.resume=never")


def test_checkpoints_without_their_configuration_are_refused(demanding, tmp_path):
    train(demanding, tmp_path / "run", "train.steps=2")
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(SystemExit, match=r"checkpoints without a config\.yaml"):
        train(demanding, tmp_path / "run", "train.steps=3")


def test_the_splits_are_written_down(demanding, tmp_path):
    train(demanding, tmp_path / "run", "train.steps=1")
    rows = (tmp_path / "run" / "splits.csv").read_text().splitlines()
    assert rows[0] == "path,label,split,group"
    assert len(rows) == 1 + 48
    assert {row.split(",")[2] for row in rows[1:]} == {"train", "val", "test"}


# Flow matching as a task


@pytest.fixture
def task(patch_folder, tmp_path, write_config) -> FlowTask:
    return FlowTask(*resolved(write_config(tmp_path, train={"batch_size": 8, "validate_pairs": 16})))


@pytest.mark.parametrize(
    "velocity",
    [
        {"name": "adm", "channels": 32, "multipliers": [1, 2], "blocks": 1, "head_channels": 16, "attention": []},
        {"name": "dit", "width": 16, "depth": 1, "heads": 2, "patch": 4},
    ],
    ids=lambda velocity: velocity["name"],
)
def test_a_network_of_another_name_trains_and_is_loaded(patch_folder, tmp_path, write_config, velocity):
    file = write_config(tmp_path, velocity=velocity, train={"steps": 3, "log_every": 1, "validate_pairs": 8})
    found = train(file, tmp_path / "run")
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3]
    network = checkpoint.load_network(found, lambda: build_flow(checkpoint.read_config(found))[1])
    assert type(network).__name__.lower() == velocity["name"]
    weights = load_file(found / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_a_batch_depends_on_its_number_and_rank_alone(task):
    one, again = (task.states(task.batch(3, rank=0)) for _ in range(2))
    for name in ("t", "x_t", "u_t"):
        assert torch.equal(getattr(one, name), getattr(again, name))
    for other in map(task.states, (task.batch(4, rank=0), task.batch(3, rank=1))):
        assert not torch.equal(one.x_t, other.x_t)
        assert not torch.equal(one.t, other.t)


def test_uint8_travels_to_the_device(task):
    """Of images and states only the noise is float."""
    batch = task.batch(0, rank=0)
    assert (batch.pairs.x0.dtype, batch.pairs.x1.dtype, batch.pairs.jitter) == (torch.uint8, torch.uint8, None)
    tensors = tree_leaves(batch)
    assert sum(value.nbytes for value in tensors if value is not None) < 8 * 3 * 16 * 16 * (1 + 1 + 4) + 1000
    states = task.states(batch)
    x0, x1 = (images.encode(x) for x in (batch.pairs.x0, batch.pairs.x1))
    expected = task.path.sample(x0, x1, batch.t, batch.noise)
    assert torch.equal(states.x_t, expected.x_t)
    assert torch.equal(states.u_t, expected.u_t)


def test_the_condition_is_dropped_for_samples_not_for_batches(patch_folder, tmp_path, write_config):
    file = write_config(tmp_path, condition={"dropout": 0.1}, train={"validate_pairs": 8, "batch_size": 16})
    task = FlowTask(*resolved(file))
    shares = [task.batch(i, rank=0).dropped.float().mean().item() for i in range(60)]
    assert sum(shares) / 60 == pytest.approx(0.1, abs=0.04)  # five standard deviations: .05
    assert sum(0 < share < 1 for share in shares) > 30


def test_figures_of_a_perfect_an_empty_and_a_blind_velocity(task):
    cpu, batches = torch.device("cpu"), list(task.validation_batches(torch.device("cpu")))

    def perfect(t, x, cond):
        return next(batch.u_t for batch in batches if torch.equal(batch.x_t, x))

    figures = task.validate(perfect, cpu)
    nothing = {f"val/condition_{name}": 0 for name in ("swap", "gain", "gain_error")}
    expected = {"val/velocity_mse": 0, "val/velocity_explained": 1, "val/condition_cosine": 1, **nothing}
    assert figures == pytest.approx(expected)
    assert ignores_condition(figures)
    figures = task.validate(lambda t, x, cond: torch.zeros_like(x), cpu)
    assert figures["val/velocity_explained"] == pytest.approx(0)
    assert figures["val/velocity_mse"] == pytest.approx(
        sum((task.model.error_weight(b.t)[:, None, None, None] * b.u_t**2).mean().item() for b in batches)
        / len(batches)
    )

    def by_class(t, x, cond):
        return torch.ones_like(x) * (2.0 * cond.target_class - 1).view(-1, 1, 1, 1)

    swapped = task.validate(by_class, cpu)
    assert swapped["val/condition_swap"] == pytest.approx(2)
    assert swapped["val/condition_cosine"] == pytest.approx(-1)

    def told(t, x, cond):  # right where the class is the batch's own, the opposite where it is not
        batch = next(batch for batch in batches if torch.equal(batch.x_t, x))
        return torch.where((cond.target_class == batch.cond.target_class).view(-1, 1, 1, 1), batch.u_t, -batch.u_t)

    used = task.validate(told, cpu)
    assert not ignores_condition(used)
    power = sum((task.model.error_weight(b.t)[:, None, None, None] * b.u_t**2).mean().item() for b in batches)
    assert used["val/condition_gain"] == pytest.approx(4e12 * power / len(batches), rel=1e-3), "of no error, bounded"


@pytest.mark.parametrize("source_class", [True, False])
@pytest.mark.parametrize("target", ["class", "level"])
def test_the_swap_diagnostic_sees_any_condition(patch_folder, tmp_path, write_config, target, source_class):
    condition = {"target": target, "source_class": source_class}
    task = FlowTask(*resolved(write_config(tmp_path, condition=condition, train={"validate_pairs": 16})))

    def told(t, x, cond):
        number = cond.target_class if target == "class" else cond.level[:, 1]
        return torch.ones_like(x) * (2.0 * number - 1).view(-1, 1, 1, 1)

    assert task.validate(told, torch.device("cpu"))["val/condition_swap"] > 1


def test_a_sheet_has_a_row_a_source_and_ends_with_its_target(task):
    sheet = task.sheet(lambda t, x, cond: torch.zeros_like(x), torch.device("cpu"))
    assert sheet.shape == ((8 * 16 + 7 * 2) * 6, (8 * 16 + 7 * 2) * 6, 3)
    assert sheet.dtype.name == "uint8"


def test_a_network_that_fits_nothing_else_is_refused(patch_folder, tmp_path, write_config):
    def build(**sections):
        build_flow(resolved(write_config(tmp_path, **sections))[0])

    with pytest.raises(UserError, match=r"data\.image_size=16: not divisible by the network's stride 32"):
        build(velocity={"multipliers": [1, 1, 1, 1, 1, 1]})
    for path in ({"name": "straight"}, {"name": "smooth"}, {"name": "noised_source", "probability": 0.5}):
        with pytest.raises(UserError, match=r"condition\.source_image.*noise on every sample"):
            build(path=path, condition={"source_image": True})
    twice = {"parts": ["source_class"]}
    with pytest.raises(UserError, match=r"condition\.parts: 'source_class' stands twice, or has a key of its own"):
        build(condition=twice)
    for path in ({"name": "noised_source"}, {"name": "brownian"}):
        build(path=path, condition={"source_image": True})


def test_levels_of_three_classes_are_soft_labels(tmp_path, make_patches, write_config):
    make_patches(tmp_path / "patches", num={"A": 12, "B": 12, "C": 12})
    config, patches = resolved(write_config(tmp_path, condition={"target": "level"}))
    told = torch.cat([FlowTask(config, patches).batch(step, rank=0).pairs.target_level for step in range(20)])
    assert {tuple(row) for row in told.tolist()} == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}
    mixed = np.full((len(patches.labels), 3), 1 / 3, np.float32)
    task = FlowTask(config, patches, levels=mixed)
    given = task.states(task.batch(0, rank=0)).cond
    torch.testing.assert_close(given.level, torch.full((8, 3), 1 / 3))
    assert given.target_class is None


def test_a_part_of_the_users_own_is_one_class_and_one_line_of_the_configuration(patch_folder, tmp_path, write_config):
    file = write_config(tmp_path, condition={"parts": [{"name": "test_velocity:Darkness"}], "dropout": 0.5})
    task = FlowTask(*resolved(file))
    batch = task.batch(0, rank=0)
    cond = task.states(batch).cond
    assert cond.darkness.shape == (8, 1)
    assert torch.equal(cond.present["darkness"], cond.darkness[:, 0] < 0)
    task.loss(task.model, batch).backward()
    assert task.model.condition.darkness.weight.grad is not None
    assert train(file, tmp_path / "run", "train.steps=1").name == "step-00000001"


# Devices and precision


def test_mixed_precision_leaves_times_and_states_in_float32(demanding, tmp_path):
    config, patches = resolved(demanding, "train.precision=bf16-mixed", "train.steps=2")
    task, seen = FlowTask(config, patches), set()
    task.model.register_forward_pre_hook(lambda module, inputs: seen.update(v.dtype for v in inputs[:2]))
    inside = set()
    task.model.stem.register_forward_hook(lambda module, inputs, output: inside.add(output.dtype))
    (tmp_path / "run").mkdir()
    newest = fit(task, config, config.train, folder=tmp_path / "run", fabric=make_fabric(config.train))
    assert seen == {torch.float32}
    assert inside == {torch.bfloat16}
    assert all(tensor.dtype == torch.float32 for tensor in load_file(newest / "model.safetensors").values())


@pytest.mark.parametrize("override", ["accelerator=abacus", "devices=oops"])
def test_impossible_devices_are_refused_by_name(config, override):
    key, value = override.split("=")
    with pytest.raises(UserError, match=rf"train\.accelerator.*{value}"):
        make_fabric(config.train.model_copy(update={key: value}))


@pytest.mark.parametrize(
    ("command", "section"),
    [
        ("train", "train"),
        ("train-classifier", "classifier.train"),
        ("train-ddim", "ddim.denoiser.train"),
    ],
)
def test_impossible_devices_are_refused_with_the_training_that_asked(tmp_path, write_config, command, section):
    asked = [f"{key}.accelerator=abacus" for key in (section, "ddim.classifier.train")]
    with pytest.raises(SystemExit, match=rf"^error: {section}\.accelerator=abacus.*not possible here"):
        cli.main([command, str(write_config(tmp_path)), *asked])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_goes_on_on_a_gpu(demanding, tmp_path):
    train(demanding, tmp_path / "run", "train.steps=2", "train.accelerator=cuda")
    assert train(demanding, tmp_path / "run", "train.steps=4", "train.accelerator=cuda").name == "step-00000004"


# What `train` does in each of two processes; the validation at its end fails.
FAILING = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch.distributed
from cellflux_bridge import cli
from cellflux_bridge.flow.task import FlowTask
FlowTask.validate = lambda self, model, device: 1 / 0
try:
    cli.main(sys.argv[1:])
except Exception as error:
    group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    written = Path(__file__).with_name(f"{torch.distributed.get_rank()}.txt")
    written.write_text(f"{group.options._timeout} {type(error).__name__} {error}")
"""


def test_two_processes_average_their_gradients_and_end_together_where_the_first_fails(demanding, tmp_path):
    """`auto` with two devices. They wait a day for the first: a validation, a cache or a pilot may outlast Fabric's
    half hour; but where it failed they do not wait."""
    once = ("train.steps=3", "train.accumulate=1", "train.warmup_steps=0", "velocity.dropout=0.0")
    script = tmp_path / "processes.py"
    script.write_text(FAILING)
    pace = ("train.devices=2", "train.checkpoint_every=2", "train.validate_every=9")
    command = [sys.executable, str(script), "train", str(demanding), f"output={tmp_path / 'two'}", *once, *pace]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "0.txt").read_text() == "1 day, 0:00:00 ZeroDivisionError division by zero"
    assert (tmp_path / "1.txt").read_text() == (
        "1 day, 0:00:00 RuntimeError the first process failed: ZeroDivisionError: division by zero"
    )

    class BothRanks(FlowTask):
        """The two processes' batches as two micro-batches of one."""

        def batch(self, index, *, rank):
            return super().batch(index // 2, rank=index % 2)

    config, patches = resolved(demanding, *once, "train.accumulate=2", "train.steps=2")
    fabric = make_fabric(config.train)
    fabric.seed_everything(config.seed, verbose=False)
    (tmp_path / "one").mkdir()
    one = fit(BothRanks(config, patches), config, config.train, folder=tmp_path / "one", fabric=fabric)
    expected = checkpoint.load_state(one)["model"]
    for name, tensor in checkpoint.load_state(checkpoint.latest(tmp_path / "two"))["model"].items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("limit", "spent", "said"),
    [
        (None, 0.0, "100 updates are left: about 50 seconds on this machine"),
        (10.0, 30.0, "100 updates are left: about 50 seconds on this machine"),  # the updates end first
        (1.0, 30.0, "60 updates, perhaps, are left: about 30 seconds, by max_minutes"),
    ],
)
def test_how_long_it_will_take_is_said_by_what_ends_it(limit, spent, said):
    train_config = TrainConfig(steps=110, max_minutes=limit)
    of = SimpleNamespace(train=train_config, state=SimpleNamespace(step=10, spent=Spent(spent, 0.0)))
    assert loop._Trainer._left(of, 0.5, Spent.now()) == said
