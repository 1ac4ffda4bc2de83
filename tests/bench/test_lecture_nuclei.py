"""The page says what was measured, leaves out what was not, and its commands are ones that `limner train` takes."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from bench import spread
from bench.lecture_nuclei import sections
from bench.lecture_nuclei_runs import POINTS, ROWS, SIDES, STAGES, STEPS, VARIANTS, cumulative
from models import checkpoint
from training.train import parse, resolve_recipe


def measured(ap: float) -> dict:
    return {"scores": {"bbox": {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2}}, "parameters": 600_000}


def test_rows_that_are_not_measured_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "nuclei"
    kept.mkdir()
    assert sections(tmp_path, tmp_path) == []
    assert "row 8 is left out" in capsys.readouterr().out
    for shift, name in enumerate(STAGES.values()):
        for side in SIDES:
            key = name if side == 320 else f"{name}-{side}"
            (kept / f"{key}.json").write_text(json.dumps(measured(side / 1000 + shift / 100)))
    seconds = {f"{name}-{side}": side / 10_000 for name in STAGES.values() for side in SIDES}
    (kept / "seconds.json").write_text(json.dumps(seconds))
    (section,) = sections(tmp_path, tmp_path)
    assert section.number == 8
    assert "| Faster R-CNN | 256 | 26.6 | 53.2 | 13.3 | 26 |" in section.body
    assert "0.60 million parameters" in section.body
    picture = (tmp_path / "lecture-stages.svg").read_text()
    sections(tmp_path, tmp_path)
    assert (tmp_path / "lecture-stages.svg").read_text() == picture, "the same figures, the same file"


def test_focal_loss_with_an_interval_of_each_difference(tmp_path: Path) -> None:
    kept = tmp_path / "nuclei"
    kept.mkdir()
    rng = np.random.default_rng(0)
    for name in ROWS[7]:
        (kept / f"{name}.json").write_text(json.dumps(measured(0.3)))
        true = rng.random((10, 60)) < 0.7
        spread.save(kept / f"{name}-bbox.npz", spread.Verdicts(true, np.arange(60) % 6, np.full(6, 12)))
    line = np.linspace(0, 1, POINTS).tolist()
    shares = {gamma: line for gamma in ("0.0", "0.5", "1.0", "2.0")}
    side = {"count": 1234, "shares": shares}
    (kept / "curves.json").write_text(json.dumps({"foreground": side, "background": side}))
    (section,) = sections(tmp_path, tmp_path)
    assert "1,234 foreground" in section.body
    assert "holds 10 % of the cross entropy" in section.body
    row = next(line for line in section.body.splitlines() if "OHEM 1:3" in line)
    assert row.count(" to ") == 1


def test_the_share_of_the_loss_that_the_easiest_hold() -> None:
    shares = cumulative(np.array([3.0, 1.0, 0.0, 4.0]))
    assert [shares[place * (POINTS - 1) // 4] for place in range(5)] == [0.0, 0.0, 0.125, 0.5, 1.0]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_command(name: str) -> None:
    argv = [*VARIANTS[name].command(), "--data", "a=b:c", "--out", "d", "--device", "cpu"]
    recipe = resolve_recipe(parse(argv))
    assert (recipe.steps, recipe.canvas.short_side, recipe.options["width"]) == (STEPS, 320, 32)
    checkpoint.build(recipe.spec())
