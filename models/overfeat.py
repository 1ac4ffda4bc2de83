"""OverFeat (Sermanet et al. 2014): a classifier made convolutional looks at every window of six scales at once, and a
regressor beside it says where in the window the object is.

It is a dense detector with one square window a cell and scale. What it finds is not suppressed but merged (section
4.3), by the service: the graph gives the best windows of all scales.
B images on a canvas (H, W), n cells of a scale, A of all scales, K classes, D detections.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import boxes as box_ops
from models import losses, matching
from models.backbones import Backbone
from models.network import Network, Predictions, Rules, Target
from models.regions import MIN_BOX_SIDE

UNIT = (1.0, 1.0, 1.0, 1.0)
SCALES = (32, 26, 21, 17, 14, 11)  # 32nds of the canvas, whose sides are multiples of 32; a factor of 1.24 apart
STRIDE = 16


class WindowHead(nn.Module):
    """Fully connected layers as convolutions over `window` x `window` cells that were pooled by `pool` (section 3.5).

    The paper pools its maps at all pool x pool offsets, slides the classifier over each and interleaves the answers.
    That is a pooling of stride 1 followed by a convolution dilated by `pool`: the same numbers, at every cell. Padding
    puts a window around each cell of the map.
    """

    def __init__(self, channels: int, hidden: Sequence[int], outputs: int, pool: int, window: int) -> None:
        super().__init__()
        self.pool, self.span = pool, pool * window  # cells of the map that a window sees along each axis
        layers: list[nn.Module] = [nn.Conv2d(channels, hidden[0], window, dilation=pool), nn.ReLU(inplace=True)]
        for i, o in zip(hidden, hidden[1:], strict=False):
            layers += [nn.Conv2d(i, o, 1), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.outputs = nn.Conv2d(hidden[-1], outputs, 1)
        nn.init.normal_(self.outputs.weight, std=0.01)
        assert self.outputs.bias is not None
        nn.init.zeros_(self.outputs.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h * w, outputs)."""
        before = (self.span - 1) // 2
        around = (before, self.span - 1 - before) * 2
        pooled = F.max_pool2d(F.pad(feature, around), self.pool, stride=1)
        return self.outputs(self.layers(pooled)).flatten(2).transpose(1, 2)


class OverFeat(Network):
    """Classifier and regressor on one trunk at stride 16."""

    exact = ("regressor",)
    mask_head = keypoint_head = None

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        hidden: Sequence[int],
        pool: int,
        window: int,
        rules: Rules,
        scales: Sequence[int] = SCALES,
    ) -> None:
        super().__init__(backbone, rules)
        backbone.levels = ()  # no head reads its maps later
        self.num_classes, self.scales = num_classes, tuple(scales)
        self.classifier = WindowHead(backbone.width, hidden, num_classes + 1, pool, window)
        self.regressor = WindowHead(backbone.width, hidden, 4 * num_classes, pool, window)

    def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
        """The D best pairs of window and class, of all scales, as boxes that nothing has merged yet. What lies outside
        the picture, and has no area once it is clipped, is none."""
        logits, deltas, windows = self._look(images)
        boxes = box_ops.clip(box_ops.decode(deltas.float(), windows[:, None], UNIT), sizes)  # (B, A, K, 4)
        scores = torch.where(box_ops.at_least(boxes, MIN_BOX_SIDE), logits.float().softmax(-1)[..., 1:], -1.0)
        keep = self.rules.max_detections
        # Padded, so that the number of windows, which follows the canvas, never reaches an output's shape.
        best, index = F.pad(scores.flatten(1), (0, keep), value=-1.0).topk(keep, dim=1)
        valid = best > self.rules.score_floor
        index = torch.where(valid, index, 0)
        chosen = boxes.flatten(1, 2).gather(1, index[..., None].expand(-1, -1, 4)) * valid[..., None]
        labels = torch.where(valid, index % self.num_classes, -1)
        return Predictions(valid.sum(1), chosen, best * valid, labels, [])

    def losses(
        self, images: Tensor, sizes: Tensor, targets: list[Target], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Of sampled windows: those that overlap an object by half are its examples (section 4.2). The regressor leaves
        the trunk as the classifier makes it, as in the paper, where it is trained afterwards."""
        logits, deltas, windows = self._look(images)
        picked, labels, moves, goals = [], [], [], []
        for image, target in enumerate(targets):
            label, index = matching.match(windows, target.boxes, target.ignore, 0.4, 0.5, rescue=True)
            label[~self._inside(windows, sizes[image])] = matching.IGNORED
            chosen = matching.sample(label, self.rules.box_samples, self.rules.foreground_fraction, generator)
            foreground = chosen[label[chosen] == matching.FOREGROUND]
            classes = torch.zeros_like(chosen)
            picked.append(logits[image, chosen])
            if len(foreground):
                owner = target.labels[index[foreground]]
                classes[: len(foreground)] = owner + 1  # sampled ones come foreground first
                moves.append(deltas[image, foreground, owner])
                goals.append(box_ops.encode(target.boxes[index[foreground]], windows[foreground], UNIT))
            labels.append(classes)
        none = windows.new_zeros((0, 4))
        moved = torch.cat(moves) if moves else deltas[:, :0].reshape(0, 4)
        all_labels = torch.cat(labels)
        return {
            "classes": losses.classes(torch.cat(picked), all_labels),
            "boxes": losses.deltas(moved, torch.cat(goals) if goals else none, len(all_labels)),
        }

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, A, K + 1), deltas (B, A, K, 4) and windows (A, 4) on the canvas, scale by scale, row by row."""
        found = [self._at_scale(images, scale) for scale in self.scales]
        logits, deltas, windows = zip(*found, strict=True)
        return torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(windows)

    def _at_scale(self, images: Tensor, scale: int) -> tuple[Tensor, Tensor, Tensor]:
        height, width = (images.shape[axis] // 32 * scale for axis in (2, 3))
        resized = F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)
        # Not -width % STRIDE: the sizes that follow from it divide a -1, which ONNX's Div rounds towards zero.
        right, bottom = ((side + STRIDE - 1) // STRIDE * STRIDE - side for side in (width, height))
        (feature,) = self.backbone(F.pad(resized, (0, right, 0, bottom)))
        deltas = self.regressor(feature.detach()).unflatten(2, (self.num_classes, 4))
        return self.classifier(feature), deltas, self._windows(feature, scale)

    def _windows(self, feature: Tensor, scale: int) -> Tensor:
        """(h * w, 4): squares around the cells, whose centres lie at multiples of the stride."""
        rows, columns = (torch.arange(side, device=feature.device) * STRIDE for side in feature.shape[2:])
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        half = self.classifier.span * STRIDE / 2
        centers = torch.stack((x, y, x, y), dim=-1).reshape(-1, 4).to(torch.float32)
        return (centers + torch.tensor([-half, -half, half, half], device=feature.device)) * (32 / scale)

    @staticmethod
    def _inside(windows: Tensor, size: Tensor) -> Tensor:
        """Those whose centre lies in the picture, (height, width), and not in the padding."""
        x, y = (windows[:, 0] + windows[:, 2]) / 2, (windows[:, 1] + windows[:, 3]) / 2
        return (x < size[1]) & (y < size[0])
