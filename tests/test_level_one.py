"""What a training says at its end."""

import json

import pytest

from cellflux_bridge.metrics import level_one


def log(path, values):
    rows = [{"step": 10 * (n + 1), "val/velocity_mse": value} for n, value in enumerate(values)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"step": 1, "loss": 1.0}, *rows]))
    return path


@pytest.mark.parametrize(
    ("values", "fell"), [([4, 3, 2, 1.6], 0.2), ([4, 1, 1, 1], 0), ([1, 1, 1, 2], -1), ([1], None), ([], None)]
)
def test_how_far_the_error_fell_in_the_last_quarter(tmp_path, values, fell):
    assert level_one.still_falling(log(tmp_path / "metrics.jsonl", values)) == pytest.approx(fell)


class Told:
    """A bridge's configuration, and what level 1 of it is told by."""

    class config:
        class train:
            steps, max_minutes, max_cpu_minutes = 300, None, None


@pytest.mark.parametrize(
    ("auc", "values", "said"),
    [
        (0.6, [2, 1, 1, 1], None),
        (0.9, [2, 1, 1, 1], "this AUC is above 0.8. Look"),
        (float("nan"), [2, 1, 1, 1], None),
        (0.6, [2, 2, 2, 1.6], "its validation error fell by 20% in the last quarter. Look"),
        (0.9, [2, 2, 2, 1.6], "its validation error fell by 20% in the last quarter and this AUC is above 0.8. Look"),
    ],
)
def test_too_little_training_is_said_with_the_command_that_mends_it(monkeypatch, tmp_path, auc, values, said):
    log(tmp_path / "metrics.jsonl", values)
    result = type("LevelOne", (), {"auc": lambda self: {"grey": auc, "colour": 1.0}})()
    monkeypatch.setattr(level_one, "level_one", lambda bridge, split, num: result)
    first, *rest = level_one.too_little(Told, tmp_path)
    assert (f"AUC {auc:.2f}" if auc == auc else "fewer than two groups") in first
    assert bool(rest) == (said is not None)
    if said:
        assert said in rest[0]
        assert rest[1] == f"  cellflux-bridge train {tmp_path} train.steps=600"


def test_what_ended_by_the_clock_is_given_more_of_the_clock(monkeypatch, tmp_path):
    log(tmp_path / "metrics.jsonl", [2, 1, 1, 1])
    result = type("LevelOne", (), {"auc": lambda self: {"grey": 0.9}})()
    monkeypatch.setattr(level_one, "level_one", lambda bridge, split, num: result)
    monkeypatch.setattr(Told.config.train, "max_minutes", 7.5)
    assert level_one.too_little(Told, tmp_path)[-1] == f"  cellflux-bridge train {tmp_path} train.max_minutes=15"
