"""How weights change: parameter groups, the rate of each step, clipping, and the moving average of the weights."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from training.recipes import Recipe

TYPICAL_WEIGHT = 0.05  # root mean square of what the heads' convolutions start with, for which rates are meant


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of step `step` of `recipe.steps`: a linear warm-up from a thousandth, then the schedule. A pure function."""
    warmup = min(recipe.warmup_steps, recipe.steps)
    rate = recipe.base_lr
    if recipe.schedule == "multistep":
        rate *= 0.1 ** sum(step >= milestone * recipe.steps for milestone in recipe.milestones)
    else:
        progress = max(0, step - warmup) / max(1, recipe.steps - warmup)
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return rate * (0.001 + 0.999 * step / warmup) if step < warmup else rate


def freeze(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = list(_groups(model, recipe))
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.base_lr, fused=True)
    return torch.optim.SGD(groups, lr=recipe.base_lr, momentum=recipe.momentum)


def _groups(model: nn.Module, recipe: Recipe) -> Iterator[dict[str, object]]:
    """Biases and norms do not decay (everything with one dimension); the trunk may learn more slowly.

    With `trunk_relative_steps` each weight of the trunk steps in proportion to its own size (Adafactor, Shazeer and
    Stern 2018, section 8). A trunk whose norms were folded into its convolutions has weights of all sizes, of which
    Adam, whose steps know none, would wreck the small ones and leave the large ones as they are. The decay of a weight
    stays what it is without.
    """
    split: dict[tuple[bool, bool, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_trunk, decays = name.startswith(("backbone.trunk.", "region_trunk.")), parameter.dim() > 1
            scaled = in_trunk and decays and recipe.trunk_relative_steps
            scale = float(parameter.detach().square().mean().sqrt()) / TYPICAL_WEIGHT if scaled else 1.0
            split.setdefault((in_trunk, decays, scale), []).append(parameter)
    for (in_trunk, decays, scale), parameters in split.items():
        yield {
            "params": parameters,
            "weight_decay": recipe.weight_decay / scale if decays else 0.0,
            "lr_multiplier": (recipe.trunk_lr_multiplier if in_trunk else 1.0) * scale,
        }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_multiplier"]


class MovingAverage:
    """An exponential moving average of a model's floating-point state, in float32.

    The decay ramps up as (1 + t) / (10 + t), so that the first weights are soon forgotten. A decay of 0 keeps a copy.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self._averaged = [tensor for tensor in self.state.values() if tensor.is_floating_point()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step)) if self.decay else 0.0
        current = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
        torch._foreach_lerp_(self._averaged, current, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def load(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
