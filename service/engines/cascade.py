"""Runs a cascade of Haar features (Viola and Jones 2001) through OpenCV: the first detector quick enough for video.

The bundle's one file is OpenCV's XML. There are no features, so no heads.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from service.bundle import Bundle, CascadeRule
from service.engines import Detected, Floats, Integers, Precision
from service.errors import BundleError
from service.proposals import opencv


class CascadeEngine:
    name = "cascade"
    precision: Precision = "float32"

    def __init__(self, bundle: Bundle) -> None:
        assert bundle.manifest.cascade is not None
        self._bundle, self._rule = bundle, bundle.manifest.cascade
        self._most = bundle.manifest.limits.max_detections
        self._cv2 = opencv("a cascade", "CascadeClassifier")
        path = bundle.stage_file("detect")
        try:
            self._classifier: Any = self._cv2.CascadeClassifier(str(path))
        except (self._cv2.error, SystemError) as error:
            raise BundleError(f"{path} cannot be read by OpenCV {self._cv2.__version__}: {error}") from error
        if self._classifier.empty():
            raise BundleError(f"{path} holds no cascade that OpenCV {self._cv2.__version__} reads")

    def split(self, num: int) -> list["CascadeEngine"]:
        """A classifier keeps what it computes in itself, so each lane has its own."""
        return [CascadeEngine(self._bundle) for _ in range(num)]

    def detect(self, images: npt.NDArray[np.uint8], sizes: Integers, *_proposals: Floats) -> Detected:
        shape = len(images), self._most
        count, boxes = np.zeros(shape[0], np.int64), np.zeros((*shape, 4), np.float32)
        scores, labels = np.zeros(shape, np.float32), np.full(shape, -1, np.int64)
        for index, (image, (height, width)) in enumerate(zip(images, sizes, strict=True)):
            found, neighbours = look(self._cv2, self._classifier, image[:height, :width], self._rule)
            sure = neighbours / (neighbours + self._rule.min_neighbors)
            # The surest first; of equal ones the first from the top left, whatever OpenCV's threads did.
            order = np.lexsort((found[:, 0], found[:, 1], -sure))[: self._most]
            count[index] = num = len(order)
            boxes[index, :num], scores[index, :num], labels[index, :num] = found[order], sure[order], 0
        return Detected(count, boxes, scores, labels, features=None)

    def masks(self, features: Any, rois: Floats, labels: Integers) -> Floats:
        raise AssertionError("a cascade has no masks")

    def keypoints(self, features: Any, rois: Floats) -> Floats:
        raise AssertionError("a cascade has no keypoints")

    def close(self) -> None:
        pass


def look(cv2: Any, classifier: Any, image: npt.NDArray[np.uint8], rule: CascadeRule) -> tuple[Floats, Floats]:
    """Boxes (n, 4) and how many windows each was grouped of (n,), from one up."""
    grey = cv2.equalizeHist(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY))
    side = (rule.min_side, rule.min_side)
    found, neighbours = classifier.detectMultiScale2(grey, scaleFactor=rule.scale_factor, minNeighbors=1, minSize=side)
    rows = np.asarray(found, np.float32).reshape(-1, 4)
    rows[:, 2:] += rows[:, :2]
    return rows, np.asarray(neighbours, np.float32).reshape(-1)
