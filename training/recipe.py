"""What a recipe says: a model, how its pictures are prepared and how it is fitted. `training.recipes` names them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from models.checkpoint import CanvasRule, Keypoints, ProposalRule, Spec
from training.compose import Augmentation


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: str
    architecture: str
    classes: tuple[str, ...]
    keypoints: Keypoints | None = None
    canvas: CanvasRule = field(default_factory=CanvasRule)
    options: dict[str, Any] = field(default_factory=dict)  # of the zoo's function
    augmentation: Augmentation = field(default_factory=Augmentation)
    steps: int
    batch_size: int
    base_lr: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    trunk_lr_multiplier: float = 1.0
    trunk_relative_steps: bool = False  # see training.optimise; for adaptive optimizers
    frozen: tuple[str, ...] = ()  # parameters whose names start so are not trained
    freeze_until: str = ""  # nor what comes before this layer of the trunk (`Network.layers`): fc6, conv3_1, layer2
    warmup_steps: int = 1000
    schedule: Literal["multistep", "cosine"] = "multistep"
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)  # of the run; each divides the rate by ten
    ema_decay: float = 0.0  # 0: the weights themselves are saved
    clip_norm: float = 0.0  # 0: no clipping
    proposals: ProposalRule | None = None  # for architectures that take them
    fits_machines: bool = False  # after the steps: see training.svm
    amp: bool = False  # bfloat16 where it is safe; the losses stay in float32

    def spec(self) -> Spec:
        return Spec(self.architecture, self.classes, self.keypoints, self.canvas, self.options, self.proposals)


COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
