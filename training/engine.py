"""A torch model behind the service's engine protocol: what is evaluated goes through the code that serves.

The manifest made here stands in for the one that an export writes; it never reaches a disk.
"""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.checkpoint import Spec
from models.network import Network
from models.servable import MEAN, STD, normalise
from service.bundle import (
    Artifact,
    Bundle,
    CanvasRule,
    Keypoints,
    Limits,
    Manifest,
    Normalisation,
    ProposalRule,
    Stage,
    Thresholds,
)
from service.detector import Detector
from service.engines import Detected, Floats, Integers, Precision


class TorchEngine:
    name = "torch"
    precision: Precision = "float32"

    def __init__(self, model: Network) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def detect(self, images: npt.NDArray[np.uint8], sizes: Integers, *proposals: Floats) -> Detected:
        on_device = torch.from_numpy(sizes).to(self.device)
        pixels = normalise(torch.from_numpy(images).to(self.device), on_device)
        given = [torch.from_numpy(each).to(self.device) for each in proposals]
        found = self.model(pixels.contiguous(memory_format=torch.channels_last), on_device, *given)
        numbers = (found.count, found.boxes, found.scores, found.labels)
        return Detected(*(tensor.cpu().numpy() for tensor in numbers), features=found.features)

    @torch.inference_mode()
    def masks(self, features: Any, rois: Floats, labels: Integers) -> Floats:
        rois_there, labels_there = (torch.from_numpy(array).to(self.device) for array in (rois, labels))
        return self.model.mask_probabilities(features, rois_there, labels_there).cpu().numpy()

    @torch.inference_mode()
    def keypoints(self, features: Any, rois: Floats) -> Floats:
        return self.model.keypoint_heatmaps(features, torch.from_numpy(rois).to(self.device)).cpu().numpy()

    def close(self) -> None:
        pass


def torch_detector(model: Network, spec: Spec, max_batch: int = 8) -> Detector:
    return Detector(Bundle(Path(), _manifest(model, spec, max_batch)), TorchEngine(model))


def _manifest(model: Network, spec: Spec, max_batch: int) -> Manifest:
    stages = ["detect"]
    stages += ["masks"] if model.mask_head is not None else []
    stages += ["keypoints"] if model.keypoint_head is not None else []
    canvas = CanvasRule.model_validate(
        {name: getattr(spec.canvas, name) for name in ("short_side", "long_side", "multiple", "antialias")}
    )
    joints = spec.keypoints if model.keypoint_head is not None else None
    return Manifest(
        name="torch",
        version="1",
        created=datetime.now(UTC).isoformat(),
        classes=list(spec.classes),
        keypoints=joints
        and Keypoints(names=list(joints.names), skeleton=list(joints.skeleton), flips=list(joints.flips)),
        canvas=canvas,
        stages={stage: Stage(file="model", inputs=[], outputs=[]) for stage in stages},  # type: ignore[misc]
        proposals=spec.proposals and ProposalRule(**asdict(spec.proposals)),
        limits=Limits(
            max_detections=model.rules.max_detections, max_batch=max_batch, max_canvas_pixels=canvas.max_pixels()
        ),
        thresholds=Thresholds(
            score_floor=model.rules.score_floor, nms_iou=model.rules.nms_iou, merge=model.rules.merge or None
        ),
        artifacts=[
            Artifact(file="model", stage=None, sha256="0" * 64, runtime="torch", precision="float32"),
        ],
        normalisation=Normalisation(mean=list(MEAN), std=list(STD)),
    )
