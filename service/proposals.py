"""Class-free boxes that may hold an object: what the systems before the region proposal network look into.

    selective_search   Uijlings et al. 2013, through OpenCV's contrib modules; fast or quality
    sliding_window     a grid of windows of several sizes and shapes; never looks at the picture

A picture and a rule give the same boxes in the same order, every time. Boxes are xyxy in image pixels.
"""

import hashlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from service.errors import EngineUnavailable, InvalidOption
from service.images import Canvas, Image

Floats = npt.NDArray[np.float32]
Method = Literal["selective_search", "sliding_window"]
Mode = Literal["fast", "quality"]

ASPECTS = (1.0, 0.5, 2.0)  # width to height of sliding windows
OVERLAP = 0.5  # of a window with the next one, along each axis
SHRINK = 2**-0.5  # from one size of windows to the next


class ProposalRule(Protocol):
    """The bundle's and the checkpoint's `ProposalRule` both have it."""

    @property
    def method(self) -> Method: ...
    @property
    def mode(self) -> Mode: ...
    @property
    def max_proposals(self) -> int: ...
    @property
    def width(self) -> int: ...


def propose(image: Image, rule: ProposalRule, count: int | None = None) -> Floats:
    """At most `count` boxes (n, 4), by default the rule's, the likeliest first.

    Raises `EngineUnavailable` where selective search is wanted and OpenCV's contrib modules are not installed.
    """
    boxes = sliding_windows(*image.shape[:2]) if rule.method == "sliding_window" else _selective_search(image, rule)
    return boxes[: rule.max_proposals if count is None else count]


def sliding_windows(height: int, width: int, least: float = 24.0) -> Floats:
    """Windows of every size from the picture's shorter side down to `least` pixels, the largest first."""
    parts, side = [], float(min(height, width))
    while side >= min(least, height, width):
        for aspect in ASPECTS:
            w, h = min(width, side * aspect**0.5), min(height, side * aspect**-0.5)
            x, y = np.meshgrid(_starts(width, w), _starts(height, h))
            parts.append(np.stack((x, y, x + w, y + h), axis=-1).reshape(-1, 4))
        side *= SHRINK
    return np.concatenate(parts).astype(np.float32)


def _starts(length: float, window: float) -> Floats:
    """Of windows that overlap by half at least and end where the picture ends."""
    steps = int(np.ceil((length - window) / (window * (1 - OVERLAP)) - 1e-6))
    return np.linspace(0, length - window, steps + 1, dtype=np.float32)


def _selective_search(image: Image, rule: ProposalRule) -> Floats:
    """On the picture at the rule's width, as the code of R-CNN's authors has it."""
    cv2 = opencv("selective search", "ximgproc")
    height, width = image.shape[:2]
    small = (rule.width, max(1, round(height * rule.width / width)))
    pixels = cv2.resize(np.ascontiguousarray(image[..., ::-1]), small, interpolation=cv2.INTER_AREA)
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(pixels)
    switch = {"fast": search.switchToSelectiveSearchFast, "quality": search.switchToSelectiveSearchQuality}
    switch[rule.mode]()
    found = np.asarray(search.process(), np.float32).reshape(-1, 4)
    boxes = np.concatenate((found[:, :2], found[:, :2] + found[:, 2:]), axis=1)
    scale = np.array([width / small[0], height / small[1]], np.float32)
    return boxes[_order(boxes)] * np.tile(scale, 2)


def _order(boxes: Floats) -> npt.NDArray[np.intp]:
    """Large regions first, shuffled: a box's place by area times a random number (Uijlings et al. section 3.3, with
    the area for the depth in the hierarchy). OpenCV gives the same boxes in an order of the C library's `rand`."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    by_area = np.lexsort((*boxes.T, -areas))
    ranks = np.arange(1, len(boxes) + 1) * np.random.default_rng(0).random(len(boxes))
    return by_area[np.argsort(ranks, kind="stable")]


def opencv(purpose: str, part: str) -> Any:
    """The module, if it has this part; raises `EngineUnavailable`, which says what to install."""
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as error:
        raise EngineUnavailable(_missing(purpose, str(error))) from None
    if not hasattr(cv2, part):
        raise EngineUnavailable(_missing(purpose, f"OpenCV {cv2.__version__} here has no {part}"))
    return cv2


def _missing(purpose: str, found: str) -> str:
    return f"{purpose} needs opencv-contrib-python-headless ({found}): pip install 'limner[proposals]'"


def check_given(boxes: Floats, image: Image) -> None:
    """Raises `InvalidOption` where a box that a client gave (n, 4) holds nothing of the picture."""
    height, width = image.shape[:2]
    inside = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    empty = (inside[:, 2] <= inside[:, 0]) | (inside[:, 3] <= inside[:, 1])
    if empty.any():
        index = int(empty.argmax())
        raise InvalidOption(
            f"proposals[{index}] = {boxes[index].tolist()} lies outside the {width}x{height} picture: give "
            "[x1, y1, x2, y2] in the pixels of the picture as a viewer shows it"
        )


def onto_canvas(boxes: Floats, canvas: Canvas) -> Floats:
    """Boxes (n, 4) of the image -> float32 boxes of its resized picture, clipped to it."""
    (height, width), (image_height, image_width) = canvas.size, canvas.image_size
    scale = np.array([width / image_width, height / image_height], np.float32)
    bounds = np.array([width, height, width, height], np.float32)
    return np.clip(boxes * np.tile(scale, 2), 0, bounds).astype(np.float32)


def stacked(canvases: list[Canvas]) -> Floats:
    """Proposals (B, R, 4) of a batch; rows without area are padding."""
    given = [canvas.proposals for canvas in canvases]
    rows = np.zeros((len(given), max(1, *(0 if each is None else len(each) for each in given)), 4), np.float32)
    for row, each in zip(rows, given, strict=True):
        assert each is not None, "this model's canvases come with proposals: Detector.fit makes them"
        row[: len(each)] = each
    return rows


class Cache:
    """Proposals on disk, by the picture's pixels and how the rule finds them: selective search takes seconds a picture.
    All that were found are kept, so that any number of them is answered without another search.

    A file is written aside and renamed, so that several processes may share a directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, image: Image, rule: ProposalRule, count: int | None = None) -> Floats:
        keep = rule.max_proposals if count is None else count
        path = self.directory / f"{self._key(image, rule)}.npy"
        try:
            return np.load(path, allow_pickle=False)[:keep]
        except (FileNotFoundError, EOFError, ValueError):  # not there, or not whole
            boxes = propose(image, rule, sys.maxsize)
        self.directory.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        with aside.open("wb") as stream:
            np.save(stream, boxes)
        aside.replace(path)
        return boxes[:keep]

    @staticmethod
    def _key(image: Image, rule: ProposalRule) -> str:
        settings = f"{rule.method} {rule.mode} {rule.width} {image.shape}"
        digest = hashlib.sha256(settings.encode())
        digest.update(np.ascontiguousarray(image).data)
        return digest.hexdigest()[:32]
