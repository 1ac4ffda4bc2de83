"""The command: its verbs, exit codes, JSON and help, and docs/command.md."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import limner
from service import bench, doctor, machine
from service.settings import Settings
from tests.service.toy import write_bundle

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "command.md").read_text(encoding="utf-8")
VERBS = ("serve", "predict", "models", "doctor", "bench", "train", "evaluate", "export onnx")
NEEDS_TORCH = ("train", "evaluate", "export onnx")
HELP: dict[str, str] = {}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundles")
    write_bundle(root)
    return root


def run(*arguments: str, code: int = 0) -> Any:
    done = CliRunner().invoke(limner.app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == code, done.output
    return done


def help_of(verb: str) -> str:
    """As a user sees it; without what is not installed the verb is skipped."""
    if verb not in HELP:
        command = [sys.executable, "limner.py", *verb.split(), "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        if "is not installed" in done.stderr and verb in NEEDS_TORCH:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        HELP[verb] = done.stdout
    return HELP[verb]


def test_it_tells_its_version() -> None:
    assert re.match(r"limner \d", run("--version").output)


# Those that import torch take seconds to say how they are used.
SLOW = [pytest.param(verb, marks=[pytest.mark.slow] if verb in NEEDS_TORCH else []) for verb in VERBS]


@pytest.mark.parametrize("verb", SLOW)
def test_every_verb_has_help_with_examples_and_a_row(verb: str) -> None:
    assert re.search(r"Examples?:", help_of(verb))
    assert f"limner {verb.split()[0]}" in help_of(verb)
    assert f"| `{verb}` |" in TEXT


def test_no_other_verbs() -> None:
    names = {command.name or command.callback.__name__ for command in limner.app.registered_commands}
    assert names | {"export onnx"} == set(VERBS)


@pytest.mark.parametrize("verb", ["predict", "doctor", "bench"])
def test_options_in_the_documentation_exist(verb: str) -> None:
    section = TEXT.split(f"\n## {verb}\n")[1].split("\n## ")[0]
    named = set(re.findall(r"--[a-z-]+", section))
    assert len(named) > 3
    known = {"--no-masks", "--no-keypoints"} if verb == "predict" else set()
    options = {
        option
        for parameter in _parameters(verb)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }  # fmt: skip
    assert known <= options
    assert named <= options


def _parameters(verb: str) -> Sequence[Any]:
    import typer.main

    return typer.main.get_command(limner.app).commands[verb].params  # type: ignore[attr-defined]


def test_help_and_predict_need_no_torch(bundles: Path, tmp_path: Path) -> None:
    picture = ROOT / "tests" / "pictures" / "astronaut.jpg"
    arguments = ["predict", str(picture), "--json", str(tmp_path / "o.json"), "--bundles", str(bundles), "-q"]
    code = f"""
import sys
for name in ("torch", "torchvision", "onnx"):
    sys.modules[name] = None
import limner
for arguments in (["--help"], {arguments!r}, ["models", "--bundles", {str(bundles)!r}]):
    try:
        limner.app(arguments)
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads((tmp_path / "o.json").read_text()), list)


def test_completion_is_offered() -> None:
    assert "--install-completion" in run("--help").output
    shown = CliRunner().invoke(limner.app, [], prog_name="limner", env={"_LIMNER_COMPLETE": "complete_bash",
                               "COMP_WORDS": "limner do", "COMP_CWORD": "1"})  # fmt: skip
    assert shown.output.split() == ["doctor"]


def test_wrong_use_is_2() -> None:
    run("nothing", code=2)
    run("predict", code=2)
    run("predict", "no-such.mp4", "--json", "-", code=2)
    assert "batches" in run("bench", "--batches", "0", code=2).output
    assert "no engine nothing" in run("bench", "--engine", "nothing", code=2).output
    assert "wrong settings" in run("doctor", "--engine", "nothing", code=2).output


def test_models_as_a_table_and_as_json(bundles: Path, tmp_path: Path) -> None:
    (row,) = json.loads(run("models", "--bundles", str(bundles), "--json").stdout)
    assert (row["name"], row["num_classes"], row["file_check"]) == ("toy", 2, "ok")
    assert "toy" in run("models", "--bundles", str(bundles)).output
    shutil.copytree(bundles, tmp_path / "own")
    (tmp_path / "own" / "toy" / "1" / "masks.onnx").write_bytes(b"altered")
    (row,) = json.loads(run("models", "--bundles", str(tmp_path / "own"), "--json", code=1).stdout)
    assert "sha256" in row["file_check"]
    run("models", "--bundles", str(tmp_path / "nothing"), code=2)


def test_doctor_finds_this_machine_well(bundles: Path) -> None:
    report = json.loads(run("doctor", "--bundles", str(bundles), "--port", "0", "--json").stdout)
    assert report["can_serve"] is True
    working = {each["name"] for each in report["engines"] if each["works"]}
    assert {(each["name"], each["engine"]) for each in report["bundles"]} == {("toy", name) for name in working}
    for each in report["bundles"]:
        assert each["loads"]
        assert each["agreement"]["box_px"] < 0.05
    ways = {each["way"]: each["reason"] for each in report["on_gpu"]}
    assert list(ways) == ["tensorrt", "aoti", "onnx on CUDA"]
    assert "no TensorRT plans" in ways["tensorrt"]
    assert "no AOTInductor packages" in ways["aoti"]
    assert report["cpu"]["usable_cores"] >= 1
    assert report["port"] == {"host": "127.0.0.1", "port": 0, "free": True}
    table = run("doctor", "--bundles", str(bundles), "--port", "0", "--engine", "onnx").output
    assert "loads and agrees" in table
    assert "yes, on onnx" in table


def test_doctor_says_what_is_wrong(bundles: Path, tmp_path: Path) -> None:
    nothing = json.loads(run("doctor", "--bundles", str(tmp_path), "--port", "0", "--json", code=1).stdout)
    assert nothing["bundles"] == []
    shutil.copytree(bundles, tmp_path / "own")
    (tmp_path / "own" / "toy" / "1" / "golden.npz").unlink()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("doctor", "--bundles", str(tmp_path / "own"), "--port", port, "--json", code=1)
    report = json.loads(done.stdout)
    assert all("golden.npz is missing" in each["reason"] for each in report["bundles"])
    assert "listens there already" in report["port"]["reason"]
    told = dict((what, finding) for what, _, finding in doctor.rows(report))
    assert "no bundle loads" in told["can serve"]


def test_doctor_with_a_broken_engine(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libsomething.so.1: cannot open shared object file")

    monkeypatch.setattr(machine.importlib, "import_module", broken)
    report = doctor.examine(Settings(bundles=bundles, port=0))
    assert not report["can_serve"]
    assert all("libsomething" in each["reason"] for each in report["engines"])
    assert "libsomething" in str(list(doctor.rows(report)))


def test_doctor_judges_what_would_be_served(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the chosen engine and in its precision, or, for auto, on the engine that the service would take."""
    wrong = Settings(bundles=bundles, port=0, engine="onnx", precision="bfloat16")
    assert not doctor.examine(wrong)["can_serve"]
    assert doctor.examine(wrong.model_copy(update={"precision": "float32"}))["can_serve"]
    engines = machine.engines()
    broken = [{**each, "installed": True, "works": each["name"] == "onnx", "reason": "broken"} for each in engines]
    monkeypatch.setattr(machine, "engines", lambda: broken)
    report = doctor.examine(Settings(bundles=bundles, port=0))
    assert (report["engine"], report["can_serve"]) == ("openvino", False)


def test_graphics_are_read_from_the_driver_s_own_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Some Card, 570.1, 81559 MiB, 9.0'\n")
    program.chmod(0o755)
    monkeypatch.setattr(machine.shutil, "which", lambda name: str(program))
    assert machine.graphics()["cards"][0]["name"] == "Some Card"
    program.write_text("#!/bin/sh\necho 'no devices were found'; exit 6\n")
    assert "no devices were found" in machine.graphics()["reason"]
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert "not found" in machine.graphics()["reason"]


def test_bench_times_every_stage(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "FEWEST_RUNS", 2)
    arguments = ("--bundles", str(bundles), "--engine", "onnx", "--threads", "1", "--seconds", "0")
    rows = json.loads(run("bench", *arguments, "--batches", "1,3,99", "--json").stdout)
    assert [row["batch"] for row in rows] == [1, 3, 99]
    for row in rows[:2]:
        assert row["engine"] == "onnx"
        assert row["rois"] == 4 * row["batch"]
        assert 0 < row["detect_ms"] <= row["total_ms"]
        assert row["masks_ms"] > 0
        assert row["keypoints_ms"] > 0
    assert "up to 16" in rows[2]["reason"]
    assert "detect" in run("bench", *arguments, "--batches", "1").output
    assert "no model" in run("bench", *arguments, "--model", "other", code=1).output
    failed = run("bench", "--bundles", str(bundles), "--engine", "onnx", "--precision", "bfloat16", code=1)
    assert "float32" in failed.output
