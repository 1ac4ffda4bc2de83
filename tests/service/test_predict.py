"""`limner predict`: videos, pictures and folders through the detector, frame by frame."""

import json
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from service import local, video
from service.predict import INTERRUPTED, Job, predict
from service.settings import Settings
from tests.service.toy import encoded, picture, wait_until, write_bundle

ROOT = Path(__file__).parents[2]
ASTRONAUT = ROOT / "tests" / "pictures" / "astronaut.jpg"
RATE, NUM, SIZE = 12, 24, (90, 120)  # frames a second, frames, height and width: two seconds

av = pytest.importorskip("av", reason='PyAV is not installed: pip install -e ".[video]"')


def panned(num: int = NUM, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """A camera that moves over the astronaut; the first pixels are red, so that the toy is sure."""
    photo = np.asarray(PIL.Image.open(ASTRONAUT).convert("RGB"))
    frames = []
    for index in range(num):
        frame = photo[60 + index : 60 + index + size[0], 2 * index : 2 * index + size[1]].copy()
        frame[:16, :16] = (250, 0, 0)
        frames.append(frame)
    return frames


def write_film(path: Path, frames: list[np.ndarray], rate: Fraction | int = RATE, rotation: int = 0) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def film_of(path: Path) -> tuple[list[np.ndarray], Any]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], stream.average_rate


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_film(tmp_path_factory.mktemp("films") / "panned.mp4", panned())


@pytest.fixture
def settings(bundles: Path) -> Settings:
    return Settings(bundles=bundles, engine="onnx", threads=1)


def differing(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other).mean())


def test_a_film_is_drawn_at_its_rate_and_size(settings: Settings, film: Path, tmp_path: Path) -> None:
    out, results = tmp_path / "out.mp4", tmp_path / "out.json"
    assert predict(Job(str(film), out, str(results)), settings) == 0
    before, after = film_of(film)[0], film_of(out)
    assert after[1] == RATE
    assert len(after[0]) == len(before) == NUM
    assert {frame.shape for frame in after[0]} == {(*SIZE, 3)}
    assert all(differing(*pair) > 5 for pair in zip(before, after[0], strict=True))
    rows = json.loads(results.read_text())
    assert {row["image_id"] for row in rows} == set(range(NUM))
    assert all(0.5 <= row["score"] <= 1 and row["segmentation"]["size"] == list(SIZE) for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.mp4"]


def test_without_detections_the_film_is_the_same_one(settings: Settings, film: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    assert predict(Job(str(film), out, confidence=1), settings) == 0
    pairs = zip(film_of(film)[0], film_of(out)[0], strict=True)
    assert max(differing(*pair) for pair in pairs) < 6  # two lossy encodings apart: no other colours, no other order


def test_answers_are_the_detector_s_own(settings: Settings, film: Path, tmp_path: Path) -> None:
    """In batches and alone, frame by frame."""
    results = tmp_path / "out.ndjson"
    assert predict(Job(str(film), json=str(results)), settings) == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    detector = local.load(settings, local.bundle_of(settings, None, None)).detector
    frames = film_of(film)[0]
    assert [line["image_id"] for line in lines] == list(range(len(frames)))
    assert [line["time_s"] for line in lines] == [round(index / RATE, 6) for index in range(len(frames))]
    for line, frame in zip(lines, frames, strict=True):
        alone = detector.detect_image(frame)
        assert len(line["detections"]) == len(alone.labels) > 0
        np.testing.assert_allclose([row["score"] for row in line["detections"]], alone.scores, atol=1e-4)
        assert [row["mask"]["counts"] for row in line["detections"]] == [mask["counts"] for mask in alone.masks or ()]
    bare = tmp_path / "bare.ndjson"
    assert predict(Job(str(film), json=str(bare), masks=False, keypoints=False, max_frames=5), settings) == 0
    rows = [json.loads(line) for line in bare.read_text().splitlines()]
    assert len(rows) == 5
    assert not {"mask", "keypoints"} & rows[0]["detections"][0].keys()


def test_rotation_is_undone(settings: Settings, tmp_path: Path) -> None:
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a rotated video")
    upright = panned(6, (96, 64))
    held = [np.ascontiguousarray(np.rot90(frame, -1)) for frame in upright]  # the phone was held on its side
    source, out = write_film(tmp_path / "held.mp4", held, rotation=90), tmp_path / "out.mp4"
    assert predict(Job(str(source), out, confidence=1), settings) == 0
    frames = film_of(out)[0]
    assert len(frames) == 6
    assert all(differing(*pair) < 8 for pair in zip(upright, frames, strict=True))


def test_odd_sides_and_odd_rates_are_kept(settings: Settings, tmp_path: Path) -> None:
    rate = Fraction(30000, 1001)
    frames = panned(7)
    source = tmp_path / "odd.mkv"
    writer = video.VideoWriter(source, rate, Fraction(1, 30000))
    for index, frame in enumerate(frames):
        writer.write(frame[:89, :119], index / rate)
    writer.finish()
    out = tmp_path / "out.mp4"
    assert predict(Job(str(source), out), settings) == 0
    after, out_rate = film_of(out)
    assert [frame.shape for frame in after] == [(89, 119, 3)] * 7
    assert float(out_rate) == pytest.approx(float(rate), rel=1e-3)


def test_uneven_times_are_kept(tmp_path: Path) -> None:
    times = [Fraction(each, 100) for each in (50, 60, 60, 90, 200)]
    writer = video.VideoWriter(tmp_path / "uneven.mp4", Fraction(10), Fraction(1, 1000))
    for frame, time in zip(panned(5), times, strict=True):
        writer.write(frame, time)
    writer.finish()
    with video.VideoReader(str(tmp_path / "uneven.mp4")) as reader:
        found = [float(time or 0) for _, time in reader.frames()]
    np.testing.assert_allclose(found, [0, 0.1, 0.101, 0.4, 1.5], atol=1e-3)


def test_a_film_becomes_pictures(settings: Settings, film: Path, tmp_path: Path) -> None:
    assert predict(Job(str(film), tmp_path / "out", max_frames=3), settings) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000001.jpg", "000002.jpg", "000003.jpg"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number, size in ((1, (64, 96)), (2, (96, 64)), (10, (64, 96))):
        (folder / f"frame{number}.png").write_bytes(encoded(picture(*size, seed=number)))
    (folder / "sub" / "deep.webp").write_bytes(encoded(picture(), "WEBP"))
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_a_folder_in_the_order_of_its_numbers(settings: Settings, photos: Path, tmp_path: Path) -> None:
    results = tmp_path / "out.jsonl"
    assert predict(Job(str(photos), tmp_path / "drawn", str(results)), settings) == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    names = ["frame1.png", "frame2.png", "frame10.png"]
    assert [(line["image_id"], line["file"]) for line in lines] == list(enumerate(names))
    assert lines[1]["image"] == {"width": 64, "height": 96}
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == sorted(names)
    with PIL.Image.open(tmp_path / "drawn" / "frame2.png") as drawn:
        assert drawn.size == (64, 96)
        assert differing(np.asarray(drawn), picture(96, 64, seed=2)) > 1


def test_a_glob_and_a_single_picture(settings: Settings, photos: Path, tmp_path: Path) -> None:
    assert predict(Job(f"{photos}/**/*.[pw]*", tmp_path / "drawn"), settings) == 0
    assert (tmp_path / "drawn" / "sub" / "deep.webp.jpg").is_file()
    assert len(list((tmp_path / "drawn").iterdir())) == 4
    assert predict(Job(str(ASTRONAUT), tmp_path / "one.png"), settings) == 0
    with PIL.Image.open(tmp_path / "one.png") as drawn:
        assert drawn.format == "PNG"


def test_a_broken_picture_is_told_and_the_rest_goes_on(
    settings: Settings, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "frame2.png").write_bytes(b"nonsense")
    results = tmp_path / "out.ndjson"
    assert predict(Job(str(photos), json=str(results)), settings) == 1
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [("error" in line, line["file"]) for line in lines] == [
        (False, "frame1.png"), (True, "frame2.png"), (False, "frame10.png")
    ]  # fmt: skip
    assert "frame2.png: the 8 bytes are no picture" in capsys.readouterr().err


def test_a_film_that_breaks_off(settings: Settings, film: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    upright, seen = video._upright, []

    def breaking(frame: Any) -> np.ndarray:
        seen.append(frame)
        if len(seen) > 13:
            raise ValueError("bad data")
        return upright(frame)

    monkeypatch.setattr(video, "_upright", breaking)
    out = tmp_path / "out.mp4"
    assert predict(Job(str(film), out), settings) == 1
    assert len(film_of(out)[0]) == 13
    said = capsys.readouterr().err
    assert "cannot be decoded (bad data)" in said
    assert "The 13 frames before that are written" in said


def test_half_a_file(settings: Settings, tmp_path: Path) -> None:
    whole, half = write_film(tmp_path / "whole.mkv", panned(60)), tmp_path / "half.mkv"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert predict(Job(str(half), tmp_path / "out.mp4"), settings) in (0, 1)  # Matroska may end anywhere
    assert 0 < len(film_of(tmp_path / "out.mp4")[0]) < 60


@pytest.mark.parametrize("content", [b"", b"nonsense" * 100, None], ids=["empty", "nonsense", "no-index"])
def test_what_is_no_film_is_an_error_in_words(
    settings: Settings, film: Path, tmp_path: Path, capsys: Any, content: bytes | None
) -> None:
    broken, out = tmp_path / "broken.mp4", tmp_path / "out.mp4"
    broken.write_bytes(film.read_bytes()[:900] if content is None else content)
    assert predict(Job(str(broken), out, str(tmp_path / "o.json")), settings) == 1
    assert "broken.mp4" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken.mp4"]


def test_a_film_without_frames(settings: Settings, film: Path, tmp_path: Path, capsys: Any) -> None:
    none = tmp_path / "none.mkv"
    with av.open(str(none), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    assert predict(Job(str(none), tmp_path / "out.mp4"), settings) == 1
    assert "none.mkv" in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"out": None}, "say what to write"),
        ({"source": "no/such.mp4"}, "there is no no/such.mp4"),
        ({"source": "no/*.jpg"}, "holds no picture"),
        ({"source": "{folder}", "out": "drawn.mp4"}, "no frame rate"),
        ({"source": "{folder}", "out": "{folder}"}, "would replace"),
        ({"source": "{film}", "out": "{film}"}, "would replace"),
        ({"out": "drawn.docx"}, "neither a folder"),
        ({"out": "nowhere/drawn.mp4"}, "make it first"),
        ({"json": "nowhere/out.json"}, "cannot be written"),
    ],
)
def test_wrong_use_is_said_before_anything_runs(
    settings: Settings, film: Path, photos: Path, capsys: Any, change: dict[str, Any], told: str, monkeypatch: Any
) -> None:
    monkeypatch.chdir(photos.parent)
    monkeypatch.setattr(local, "load", None)
    given = {"source": str(film), "out": "out.mp4", **change}
    places = {"folder": photos, "film": film}
    filled = {name: value and value.format(**places) for name, value in given.items()}
    out = Path(filled["out"]) if filled["out"] else None
    assert predict(Job(filled["source"], out, filled.get("json")), settings) == 2
    assert told in capsys.readouterr().err
    assert not Path("out.mp4").exists()


def test_unknown_models_and_bundles_by_their_directory(
    settings: Settings, film: Path, tmp_path: Path, capsys: Any
) -> None:
    job = {"source": str(film), "json": str(tmp_path / "o.ndjson"), "max_frames": 1}
    assert predict(Job(**job, model="other"), settings) == 1
    assert "there are: toy@1" in capsys.readouterr().err
    own = write_bundle(tmp_path / "else", "own", "7", heads=())
    assert predict(Job(**job, bundle=own), settings) == 0
    assert json.loads((tmp_path / "o.ndjson").read_text())["model"] == {"name": "own", "version": "7"}
    assert predict(Job(**job, model="toy@1"), settings) == 0


def test_without_pyav_it_says_what_to_install(
    settings: Settings, film: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    find = video.importlib.util.find_spec
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    assert predict(Job(str(film), tmp_path / "out.mp4"), settings) == 1
    assert 'pip install -e ".[video]"' in capsys.readouterr().err
    assert predict(Job(str(ASTRONAUT), tmp_path / "one.jpg"), settings) == 0  # pictures need none


def test_the_command_and_ctrl_c(bundles: Path, tmp_path: Path) -> None:
    source = write_film(tmp_path / "long.mp4", panned() * 60)
    out, results = tmp_path / "out.mp4", tmp_path / "out.json"
    command = [sys.executable, "limner.py", "predict", str(source), "--out", str(out), "--json", str(results)]
    command += ["--bundles", str(bundles), "--engine", "onnx", "--threads", "1", "--batch", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        # COCO results come aside as frames are written; a film's first packets wait inside the encoder.
        wait_until(lambda: any(path.stat().st_size > 9000 for path in tmp_path.glob(".out.json.*")), seconds=120)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == INTERRUPTED, said
    assert "Traceback" not in said
    frames = film_of(out)[0]
    assert 0 < len(frames) < 60 * NUM
    assert {row["image_id"] for row in json.loads(results.read_text())} == set(range(len(frames)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.mp4", "out.json", "out.mp4"]
