"""The page in a real browser, against a real server with the bundled person model."""

import base64
import io
import json
import os
import shlex
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import PIL.Image
import pytest

from service import draw, masks
from tests.web.conftest import API_KEY, ROOT, Opened

PHOTO = ROOT / "tests" / "pictures" / "astronaut.jpg"
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True}

GIVE = """([event, name, data]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const carried = new DataTransfer();
  carried.items.add(new File([bytes], name));
  const told = { bubbles: true, cancelable: true };
  const made = event === "paste" ? new ClipboardEvent(event, { ...told, clipboardData: carried })
                                 : new DragEvent(event, { ...told, dataTransfer: carried });
  document.getElementById("stage").dispatchEvent(made);
}"""

# Each mask of an answer with masks=probability as masks.js pastes it, in the picture's own pixels: rows of 0 and 1.
PASTE = """async ([answer, threshold]) => {
  const { decode, paste } = await import("/web/masks.js");
  const { width, height } = answer.image;
  return answer.detections.map(({ mask }) => {
    const full = new Uint8Array(width * height);
    const part = paste(decode(mask), mask.box, threshold, width, height);
    for (let y = 0; y < part.height; y++)
      full.set(part.inside.subarray(y * part.width, (y + 1) * part.width), (part.top + y) * width + part.left);
    return full.join("");
  });
}"""


CLIPBOARD = """async () => {
  const [item] = await navigator.clipboard.read();
  const bytes = new Uint8Array(await (await item.getType("image/png")).arrayBuffer());
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}"""


def give(opened: Opened, event: str, path: Path, name: str | None = None) -> None:
    data = base64.b64encode(path.read_bytes()).decode()
    opened.page.evaluate(GIVE, [event, name or path.name, data])


def drop(opened: Opened, path: Path = PHOTO) -> dict[str, Any]:
    """Returns the answer that the page draws from."""
    with opened.page.expect_response(lambda answer: "/detect?" in answer.url) as waited:
        give(opened, "drop", path)
    opened.wait_for("ready")
    return waited.value.json()


def without_times(answer: str | bytes) -> dict[str, Any]:
    return {name: value for name, value in json.loads(answer).items() if name != "timings_ms"}


def downloaded(opened: Opened, button: str) -> tuple[str, bytes]:
    with opened.page.expect_download() as waited:
        opened.page.click(button)
    return waited.value.suggested_filename, Path(waited.value.path()).read_bytes()


def run_curl(line: str) -> bytes:
    """By curl where there is one, else as it would send it; in the folder of the photo."""
    if shutil.which("curl"):
        command = ["sh", "-c", line.replace("curl ", "curl --silent --show-error --fail --noproxy '*' ", 1)]
        return subprocess.run(command, cwd=PHOTO.parent, capture_output=True, timeout=120, check=True).stdout
    program, option, name, url = shlex.split(line)
    assert (program, option) == ("curl", "--data-binary")
    return urllib.request.urlopen(url, (PHOTO.parent / name.removeprefix("@")).read_bytes(), timeout=120).read()


def test_a_dropped_photo_is_drawn(opened, address):
    page = opened(address)
    assert page.page.is_visible("text=Drop a picture here")
    answer = drop(page)
    assert len(page.detections_asked()) == 1
    shown = [each for each in answer["detections"] if each["score"] >= 0.5]
    assert shown
    items = page.page.locator("#found li")
    assert items.count() == len(shown)
    assert [f"{each['score']:.3f}" for each in shown] == items.locator(".score").all_text_contents()
    assert page.page.get_attribute("#canvas", "aria-label").startswith("astronaut.jpg: person")
    stages = page.page.locator("#time-stages dt").all_text_contents()
    assert stages == list(answer["timings_ms"])
    drawn = page.pixels()
    assert drawn.shape[0] > 400
    for name in ("boxes", "masks", "keypoints", "labels"):
        page.page.uncheck(f"#{name}")
        less = page.pixels()
        assert (less != drawn).any(), f"{name} were not drawn"
        drawn = less
    assert len(page.detections_asked()) == 1


def test_neither_slider_asks_again_until_it_must(opened, address):
    page = opened(address)
    answer = drop(page)
    asked = float(parse_qs(urlsplit(page.detections_asked()[0]).query)["confidence"][0])
    for value in (0.3, 0.9, asked):
        page.slide("confidence", value)
        expected = sum(each["score"] >= value for each in answer["detections"])
        assert page.page.locator("#found li").count() == expected
    assert page.page.locator("#found li").count() == len(answer["detections"]) > 1
    page.slide("confidence", 0.5)
    for name in ("boxes", "keypoints", "labels", "masks"):
        page.page.uncheck(f"#{name}")
    bare = page.pixels()
    page.page.check("#masks")
    covered = []
    for value in (0.1, 0.5, 0.9):
        page.slide("threshold", value)
        covered.append(int((page.pixels() != bare).any(axis=2).sum()))
    assert covered[0] > covered[1] > covered[2] > 0
    assert len(page.detections_asked()) == 1, "the page has the probabilities, and asked all the same"
    with page.page.expect_response(lambda answer: "/detect?" in answer.url):
        page.slide("confidence", 0.06)
    page.wait_for("ready")
    assert len(page.detections_asked()) == 2
    assert float(parse_qs(urlsplit(page.detections_asked()[1]).query)["confidence"][0]) <= 0.06
    page.slide("confidence", 0.05)
    page.slide("confidence", 0.7)
    assert len(page.detections_asked()) == 2


def test_the_masks_are_the_services(opened, address):
    page = opened(address)
    answer = drop(page)
    for threshold in (0.5, 0.7):
        query = f"detect?confidence=0.1&mask_threshold={threshold}"
        exact = json.loads(urllib.request.urlopen(address + query, PHOTO.read_bytes(), timeout=120).read())
        rows = page.page.evaluate(PASTE, [answer, threshold])
        assert len(rows) == len(exact["detections"]) > 1
        for row, theirs in zip(rows, exact["detections"], strict=True):
            found, pixels = np.array(list(row), np.uint8), masks.decode(theirs["mask"]).ravel()
            union = (found | pixels).sum()
            overlap = (found & pixels).sum() / union if union else 1.0
            assert overlap > 0.99


def test_json_and_curl_are_one_answer(opened, address):
    page = opened(address)
    drop(page)
    page.slide("confidence", 0.4)
    page.slide("threshold", 0.6)
    page.page.uncheck("#keypoints")
    page.page.click("#copy-curl")
    page.page.wait_for_selector("#copy-curl:text('Copied')")
    line = page.page.evaluate("() => navigator.clipboard.readText()")
    assert line == page.page.text_content("#curl")
    theirs = without_times(run_curl(line))
    name, saved = downloaded(page, "#save-json")
    assert name == "astronaut.json"
    assert without_times(saved) == theirs
    assert theirs["detections"]
    assert min(each["score"] for each in theirs["detections"]) >= 0.4
    assert not any("keypoints" in each for each in theirs["detections"])
    assert all(each["mask"]["format"] == "rle" for each in theirs["detections"])
    asked = len(page.detections_asked())
    page.page.click("#copy-json")
    page.page.wait_for_selector("#copy-json:text('Copied')")
    assert page.page.evaluate("() => navigator.clipboard.readText()") == saved.decode()
    assert len(page.detections_asked()) == asked, "what was saved a moment ago was asked for again"


def test_the_curl_line_is_safe_in_a_shell(opened, toy_address, tmp_path):
    page = opened(toy_address)
    curl_line = "async (name) => (await import('/web/service.js')).curlLine(name, { confidence: 0.5 })"
    for name in ("my photo.jpg", "it's.jpg", "$(touch x) `touch y`.jpg", '"; touch z".jpg', "a&b.jpg"):
        line = page.page.evaluate(curl_line, name)
        assert shlex.split(line) == ["curl", "--data-binary", f"@{name}", f"{toy_address}detect?confidence=0.5"]
        echoed = line.replace("curl", "printf '%s\\n'", 1)
        shown = subprocess.run(["sh", "-c", echoed], cwd=tmp_path, capture_output=True, timeout=60, check=True)
        assert shown.stdout.decode().splitlines()[1] == f"@{name}"
    assert not list(tmp_path.iterdir())


def test_the_saved_picture_is_the_picture_with_the_drawing(opened, address):
    page = opened(address)
    answer = drop(page)
    name, saved = downloaded(page, "#save-picture")
    assert name == "astronaut-drawn.png"
    found = np.asarray(PIL.Image.open(io.BytesIO(saved)).convert("RGB")).astype(int)
    before = np.asarray(PIL.Image.open(PHOTO).convert("RGB")).astype(int)
    assert found.shape == before.shape
    x1, y1, x2, _ = (round(value) for value in answer["detections"][0]["box"])
    away = np.s_[:, x2 + 10 :]
    assert np.abs(found[away] - before[away]).mean() < 2  # decoders of JPEG differ by a little
    edge = found[(y1 + 60) : (y1 + 200), x2 - 3 : x2 + 4]
    nearest = np.abs(edge - np.array(draw.COLOURS[0])).sum(axis=2).min(axis=1)
    assert np.median(nearest) < 60, "no line in the colour of the first detection where its box ends"
    page.page.click("#copy-picture")
    page.page.wait_for_selector("#copy-picture:text('Copied')")
    copied = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(page.page.evaluate(CLIPBOARD)))).convert("RGB"))
    assert np.array_equal(copied, found)


def test_a_text_file_is_refused_in_the_words_of_the_service(opened, address, tmp_path):
    page = opened(address)
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    with page.page.expect_response(lambda answer: "/detect?" in answer.url) as waited:
        give(page, "drop", text)
    told = waited.value.json()
    page.wait_for("problem")
    alert = page.page.locator("[role=alert]:visible")
    assert told["title"] in alert.inner_text()
    assert told["detail"] in alert.inner_text()
    assert told["request_id"] in alert.inner_text()
    assert not page.page.is_visible("#canvas")
    assert not page.page.is_visible("#take")
    drop(page)
    assert not page.page.is_visible("#problem")


def test_a_service_that_is_gone_and_comes_back(opened, address):
    page = opened(address)
    page.page.route("**/detect?*", lambda route: route.abort())
    give(page, "drop", PHOTO)
    page.wait_for("problem")
    assert page.page.inner_text("#problem-title") == "The service did not answer"
    page.page.unroute("**/detect?*")
    page.page.click("#again")
    page.wait_for("ready")
    assert page.page.locator("#found li").count() > 0


def test_only_the_last_of_two_pictures_is_shown(opened, address):
    page = opened(address)
    waiting = []
    page.page.route("**/detect?*", lambda route: waiting.append(route) if not waiting else route.continue_())
    with page.page.expect_request(lambda request: "/detect?" in request.url):
        give(page, "drop", PHOTO, "first.jpg")
    give(page, "drop", PHOTO, "second.jpg")
    page.wait_for("ready")
    assert page.page.get_attribute("#canvas", "aria-label").startswith("second.jpg")


def test_pasted_chosen_sample_and_camera(opened, address):
    page = opened(address)
    give(page, "paste", PHOTO)
    page.wait_for("ready")
    assert page.page.inner_text("#picture-told") == "astronaut.jpg, 512 × 512"
    page.page.set_input_files("#file", PHOTO)
    page.page.wait_for_selector("#curl:text('astronaut.jpg')")
    page.page.click("#sample")
    page.page.wait_for_selector("#curl:text('sample.jpg')")
    page.page.click("#use-camera")
    page.page.wait_for_selector("#shoot:enabled")
    page.page.click("#shoot")
    page.page.wait_for_selector("#picture-told:text('camera.jpg')")
    page.wait_for("ready")
    assert not page.page.is_visible("#camera")
    assert page.page.evaluate("() => document.getElementById('video').srcObject") is None, "the camera is still on"


def test_a_kind_that_the_browser_cannot_show(opened, address, tmp_path):
    page = opened(address)
    path = tmp_path / "photo.tiff"
    PIL.Image.open(PHOTO).save(path)
    give(page, "drop", path)
    page.wait_for("ready")
    assert page.page.locator("#found li").count() > 0
    assert page.page.inner_text("#picture-told") == "photo.tiff, 512 × 512"
    assert page.pixels().std() > 20, "no picture is behind the drawing"


def test_one_detection_can_be_singled_out(opened, address):
    page = opened(address)
    drop(page)
    page.slide("confidence", 0.1)
    plain = page.pixels()
    first = page.page.locator("#found button").first
    first.focus()
    page.page.keyboard.press("Enter")
    assert first.get_attribute("aria-pressed") == "true"
    assert (page.pixels() != plain).any()
    page.page.keyboard.press("Enter")
    assert first.get_attribute("aria-pressed") == "false"
    assert (page.pixels() == plain).all()


def tab_to(page: Any, name: str) -> None:
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.id") == name:
            return
    raise AssertionError(f"Tab does not reach {name}")


def test_everything_by_keyboard(opened, address):
    page = opened(address)
    tab_to(page.page, "choose")
    with page.page.expect_file_chooser() as waited:
        page.page.keyboard.press("Enter")
    waited.value.set_files(PHOTO)
    page.wait_for("ready")
    for name in ("boxes", "masks", "keypoints", "labels"):
        tab_to(page.page, name)
        page.page.keyboard.press("Space")
        assert not page.page.is_checked(f"#{name}")
        page.page.keyboard.press("Space")
    tab_to(page.page, "confidence")
    page.page.keyboard.press("ArrowRight")
    assert page.page.inner_text("#confidence-told") == "0.51"
    tab_to(page.page, "threshold")
    page.page.keyboard.press("ArrowLeft")
    assert page.page.inner_text("#threshold-told") == "0.49"
    tab_to(page.page, "copy-curl")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#copy-curl:text('Copied')")
    assert page.page.evaluate("() => document.activeElement.id") == "copy-curl"
    assert len(page.detections_asked()) == 1


def test_a_service_with_keys_and_two_models(opened, toy_address, tmp_path):
    page = opened(toy_address)
    page.page.wait_for_selector("#key-panel:visible")
    page.page.fill("#key", "not-the-key-of-the-tests")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#model-told:text('not known')")
    page.page.fill("#key", API_KEY)
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#model-choice:visible")
    assert page.page.locator("#model option").all_text_contents() == ["first 1", "plain 1"]
    drop(page)
    assert API_KEY not in page.page.content()
    assert "$LIMNER_API_KEY" in page.page.text_content("#curl")
    assert not any(API_KEY in url for url in page.asked)
    assert page.page.evaluate("() => localStorage.length + document.cookie.length") == 0
    with page.page.expect_response(lambda answer: "/detect?" in answer.url) as waited:
        page.page.select_option("#model", "plain")
    assert waited.value.json()["model"]["name"] == "plain"
    assert page.page.is_disabled("#masks")
    assert page.page.is_disabled("#keypoints")
    assert "model=plain" in page.page.text_content("#curl")


@pytest.fixture(scope="session")
def axe() -> str:
    """The text of axe-core: `npm install axe-core` in the checkout, or AXE_CORE says where axe.min.js is."""
    places = [os.environ.get("AXE_CORE", ""), ROOT / "node_modules" / "axe-core" / "axe.min.js"]
    found = next((Path(place) for place in places if place and Path(place).is_file()), None)
    if found is None:
        pytest.skip("axe-core is not here: npm install axe-core, or set AXE_CORE to its axe.min.js")
    return found.read_text(encoding="utf-8")


@pytest.mark.parametrize("size", ["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened, address, axe, scheme, size, tmp_path):
    page = opened(address, color_scheme=scheme, **(PHONE if size == "phone" else {}))
    page.page.evaluate(axe)
    check_axe(page.page, "empty")
    drop(page)
    page.slide("confidence", 0.1)
    check_axe(page.page, "ready")
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    give(page, "drop", text)
    page.wait_for("problem")
    check_axe(page.page, "problem")


def check_axe(page: Any, state: str) -> None:
    found = page.evaluate("async () => (await axe.run()).violations")
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, (state, [(each["id"], [node["html"] for node in each["nodes"]]) for each in serious])


@pytest.mark.parametrize("size", [PHONE, {"viewport": {"width": 320, "height": 600}}], ids=["phone", "narrow"])
def test_a_phone_needs_no_sideways_scrolling(opened, address, size):
    page = opened(address, **size)
    drop(page)
    wide, seen = page.page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= seen
    ratio = page.page.evaluate("() => { const c = document.getElementById('canvas'); return c.width / c.clientWidth; }")
    assert ratio == pytest.approx(size.get("device_scale_factor", 1), abs=0.02)
