"""A run: exact resume, partial labels, messages."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import checkpoint
from models.checkpoint import COCO_PERSON
from models.zoo import MODELS
from training.curves import main as curves_main
from training.curves import read
from training.data import read_source
from training.recipes import RECIPES
from training.train import init_from, main, make_batches, parse, resolve_recipe
from training.trainer import Trainer, TrainingError

CPU = torch.device("cpu")


def command(source, out: Path, *more: str) -> list[str]:
    data = f"toy={source.images}:{source.annotations}"
    return ["tiny", "--data", data, "--out", str(out), "--device", "cpu", "--workers", "0", "--threads", "2", *more]


def losses_of(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def trainer_on(source, recipe, classes=("person",)):
    items = read_source(source, classes, COCO_PERSON)
    torch.manual_seed(0)
    return Trainer(checkpoint.build(recipe.spec()), recipe, CPU, 0), make_batches(recipe, items, [source], 0)


def test_a_resumed_run_is_the_unbroken_one(make_data, tiny, tmp_path, monkeypatch):
    source = make_data(count=4)
    assert main(command(source, tmp_path / "whole")) == 0
    broken = tmp_path / "broken"
    # The power goes after step 4; the last save was after step 3.
    advance = Trainer.advance

    def dies(self, batch):
        if self.step == 4:
            raise TrainingError("the power went")
        return advance(self, batch)

    monkeypatch.setattr(Trainer, "advance", dies)
    assert main(command(source, broken, "--save-every", "3")) == 1
    monkeypatch.setattr(Trainer, "advance", advance)
    assert main(command(source, broken, "--resume", "--workers", "1")) == 0
    assert losses_of(broken) == losses_of(tmp_path / "whole")
    whole, resumed = (checkpoint.load(out / "last")[0].state_dict() for out in (tmp_path / "whole", broken))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_time_limit_leaves_a_run_that_goes_on(make_data, tiny, tmp_path, capsys):
    source = make_data(count=4)
    assert main(command(source, tmp_path / "out", "--time-limit", "0.01")) == 0
    assert "stopped by the time limit" in capsys.readouterr().out
    assert len(losses_of(tmp_path / "out")) == 1
    assert main(command(source, tmp_path / "out", "--resume")) == 0
    assert [line["step"] for line in losses_of(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


def test_evaluation_on_schedule_keeps_the_best(make_data, tiny, tmp_path):
    source = make_data(count=4)
    where = f"{source.images}:{source.annotations}"
    assert main(command(source, tmp_path / "out", "--eval", where, "--eval-every", "4")) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation" in line] == [4, 6]
    model, spec = checkpoint.load(tmp_path / "out/best")
    assert spec == tiny.spec()
    provenance = checkpoint.read_config(tmp_path / "out/best")["provenance"]
    assert set(provenance["ap"]) == {"bbox", "segm", "keypoints"}
    assert str(tmp_path) not in json.dumps(provenance), "a checkpoint travels; the paths of this machine stay"


def test_weights_can_be_taken_over(make_data, tiny, tmp_path, capsys):
    source = make_data(count=2)
    assert main(command(source, tmp_path / "a", "--steps", "1")) == 0
    assert main(command(source, tmp_path / "b", "--steps", "1", "--init", str(tmp_path / "a/last"))) == 0
    assert "tensors taken over" in capsys.readouterr().out


def test_a_deepened_head_starts_as_what_it_was(tiny, tmp_path):
    torch.manual_seed(0)
    shallow = checkpoint.build(tiny.spec()).eval()
    checkpoint.save(tmp_path / "shallow", shallow, tiny.spec())
    options = {**tiny.options, "mask_convs": 4, "keypoint_convs": 6}
    deep = checkpoint.build(dataclasses.replace(tiny, options=options).spec()).eval()
    init_from(deep, tmp_path / "shallow")
    pooled = torch.randn(2, shallow.backbone.width, 14, 14)
    torch.testing.assert_close(deep.mask_head(pooled), shallow.mask_head(pooled))
    torch.testing.assert_close(deep.keypoint_head(pooled), shallow.keypoint_head(pooled))


def test_a_source_without_masks_adds_nothing_to_the_mask_loss(make_data, tiny):
    trainer, data = trainer_on(make_data(masks=False), tiny)
    head = [p for name, p in trainer.model.named_parameters() if name.startswith("mask_head.")]
    values = trainer.advance(data[0])
    assert values["masks"] == 0
    assert all(p.grad is not None and not p.grad.any() for p in head)
    assert values["keypoints"] > 0


def test_a_batch_without_keypoints_trains(make_data, tiny):
    trainer, data = trainer_on(make_data(keypoints=False), tiny)
    values = trainer.advance(data[0])
    assert values["keypoints"] == 0
    assert values["masks"] > 0
    assert trainer.step == 1


def test_pictures_without_objects_train(make_data, tiny):
    trainer, data = trainer_on(make_data(objects=0), tiny)
    values = trainer.advance(data[0])
    assert (values["boxes"], values["masks"], values["keypoints"]) == (0, 0, 0)
    assert values["rpn_objectness"] > 0


def test_a_loss_that_is_not_finite_names_the_pictures(make_data, tiny):
    trainer, data = trainer_on(make_data(), tiny)
    with torch.no_grad():
        next(p for p in trainer.parameters if p.dim() == 4).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 0: .*\.png"):
        trainer.advance(data[0])


def test_losses_fall(make_data, tiny):
    recipe = dataclasses.replace(tiny, base_lr=2e-3, steps=60, frozen=(), freeze_until="")
    trainer, data = trainer_on(make_data(count=2), recipe)
    batch = data[0]
    first = trainer.advance(batch)
    for _ in range(30):
        last = trainer.advance(batch)
    assert last["loss"] < 0.9 * first["loss"]


def test_clear_messages(make_data, tiny, tmp_path, capsys):
    source = make_data(count=1)
    wrong = {
        "unknown recipe": ["nonesuch", *command(source, tmp_path)[1:]],
        "no such annotation file": ["tiny", "--data", "x=a:b.json", "--out", str(tmp_path)],
        "expected NAME=": ["tiny", "--data", "x", "--out", str(tmp_path)],
        "both of which exist": command(source, tmp_path, "--eval", "a:b"),
        "holds no config.json": command(source, tmp_path, "--init", str(tmp_path / "none")),
        "No such file": command(source, tmp_path, "--trunk", str(tmp_path / "none.pth")),
    }
    for message, argv in wrong.items():
        assert main(argv) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_every_recipe_builds_its_model_and_freezes_something():
    for name, make in RECIPES.items():
        recipe = make()
        assert recipe.name == name
        with torch.device("meta"):
            model = checkpoint.build(recipe.spec())
        names = [n for n, _ in model.named_parameters()]
        for prefix in recipe.frozen + (model.before(recipe.freeze_until) if recipe.freeze_until else ()):
            if "bn1" not in prefix:  # frozen norms have no parameters
                assert any(n.startswith(prefix) for n in names), prefix


def test_every_name_of_the_zoo_has_a_recipe():
    assert {make().architecture for make in RECIPES.values()} == MODELS.keys()


def test_a_trunk_is_left_alone_up_to_a_layer(make_data, tiny, tmp_path, capsys):
    source = make_data(count=2)
    trainer, _ = trainer_on(source, dataclasses.replace(tiny, frozen=(), freeze_until="14"))
    learns = {n.split(".")[2] for n in names_that_learn(trainer.model) if n.startswith("backbone.trunk.")}
    assert learns == {"14", "15", "16", "17"}
    assert main(command(source, tmp_path / "none", "--freeze-until", "fc6")) == 2
    assert "this trunk has no layer 'fc6'; it has 0, 1, 2" in capsys.readouterr().err
    # The command line's layer takes the place of the recipe's; nothing at all is a choice, too.
    assert resolve_recipe(parse(command(source, tmp_path, "--freeze-until", ""))).freeze_until == ""
    assert resolve_recipe(parse(command(source, tmp_path))).freeze_until == tiny.freeze_until != ""


def test_options_of_the_architecture_and_the_canvas_by_the_command(make_data, tiny, tmp_path, capsys):
    source = make_data(count=2)
    given = ["--option", "fc=48", "--option", 'pooler="pool"', "--short-side", "96"]
    recipe = resolve_recipe(parse(command(source, tmp_path, *given)))
    assert recipe.options == {**tiny.options, "fc": 48, "pooler": "pool"}
    assert recipe.canvas == dataclasses.replace(tiny.canvas, short_side=96)
    assert recipe.augmentation.short_sides == ()
    for wrong, message in (("fc", "expected NAME=JSON"), ("fc=a", "expected NAME=JSON"), ("fcs=1", "does not take")):
        assert main(command(source, tmp_path / "none", "--option", wrong)) == 2
        assert message in capsys.readouterr().err


def names_that_learn(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_signal_saves_before_it_ends(make_data, tiny, tmp_path, monkeypatch, capsys):
    advance = Trainer.advance

    def told_to_stop(self, batch):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, batch)

    monkeypatch.setattr(Trainer, "advance", told_to_stop)
    assert main(command(make_data(), tmp_path / "out", "--workers", "1")) == 0
    assert "stopped by SIGTERM" in capsys.readouterr().out
    assert torch.load(tmp_path / "out/resume.pt", weights_only=True)["step"] == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ctrl_c_reaches_the_workers_and_the_run_is_saved_all_the_same(make_data, tmp_path):
    """A terminal signals the whole group: trainer and workers."""
    data, out = make_data(), tmp_path / "out"
    given = ["--data", f"a={data.images}:{data.annotations}", "--out", str(out), "--batch-size", "1", "--workers", "1"]
    run = [sys.executable, "-m", "training.train", "person_mobilenetv2_fpn", *given, "--log-every", "1"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("1/"):
                break
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 0, rest
    assert "stopped by SIGINT" in rest
    assert (out / "resume.pt").is_file()


def test_curves_show_the_run(make_data, tiny, tmp_path):
    data, out = make_data(), tmp_path / "out"
    assert main(command(data, out, "--eval", f"{data.images}:{data.annotations}")) == 0
    steps, evaluations = read(out)
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert set(evaluations[-1]) == {"step", "bbox", "segm", "keypoints"}
    assert curves_main([str(out), "--out", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert curves_main([str(tmp_path), "--out", str(tmp_path / "none.png")]) == 2
