"""One run's state and its step: model, optimiser, moving average; exact save and resume.

Nothing here depends on the wall clock or on a global random generator: step `s` of a run is a function of the seed, of
`s` and of the state after step `s - 1`, so a resumed run is the unbroken one.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import checkpoint
from models.network import Network
from models.servable import normalise
from training.batches import Batch
from training.optimise import MovingAverage, freeze, learning_rate, make_optimizer, set_learning_rate
from training.recipes import Recipe

FORMAT = 1


class TrainingError(RuntimeError):
    """The run cannot go on; the message says at which step and why."""


class Trainer:
    def __init__(self, model: Network, recipe: Recipe, device: torch.device, seed: int) -> None:
        freeze(model, recipe.frozen + (model.before(recipe.freeze_until) if recipe.freeze_until else ()))
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.recipe, self.device, self.seed = recipe, device, seed
        self.optimizer = make_optimizer(self.model, recipe)
        self.average = MovingAverage(self.model, recipe.ema_decay)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.step = 0  # steps done
        self.best = -1.0  # best score of an evaluation so far

    def advance(self, batch: Batch) -> dict[str, float]:
        """One step; returns its losses, their sum as "loss", the rate and the norm of the gradient."""
        self.model.train()
        rate = learning_rate(self.recipe, self.step)
        set_learning_rate(self.optimizer, rate)
        losses = self._losses(batch)
        total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm or float("inf"))
        numbers = torch.stack([total, norm, *losses.values()]).tolist()  # the one wait for the device
        values = dict(zip(["loss", "grad_norm", *losses], numbers, strict=True))
        self._check(values, batch)
        self.optimizer.step()
        self.average.update(self.model, self.step)
        self.step += 1
        return values | {"lr": rate}

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        counts = [each.tolist() for each in (batch.counts, batch.ignore_counts, batch.proposal_counts)]
        there = batch.to(self.device)
        targets = there.targets(*counts)
        images = normalise(there.images, there.sizes).contiguous(memory_format=torch.channels_last)
        # The generator lives on the CPU whatever the device, so the same samples are drawn on both.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.amp):
            losses = self.model.losses(images, there.sizes, targets, generator)
        return {name: loss.float() for name, loss in losses.items()}

    def _check(self, values: dict[str, float], batch: Batch) -> None:
        bad = [name for name, value in values.items() if not abs(value) < float("inf")]
        if bad:
            pictures = ", ".join(sorted({name for names in batch.names for name in names}))
            raise TrainingError(
                f"step {self.step}: {', '.join(bad)} is not finite; the weights before it are kept. Lower --lr, or "
                f"look at these pictures: {pictures}"
            )

    def save_resume(self, path: Path, run: dict[str, Any]) -> None:
        """`run` describes the run in plain values; a resume compares it with its own."""
        content = {
            "format": FORMAT,
            "run": run,
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),
            "average": self.average.state,
            "optimizer": self.optimizer.state_dict(),
        }
        aside = path.with_suffix(".part")
        torch.save(content, aside)
        os.replace(aside, path)

    def load_resume(self, path: Path) -> dict[str, Any]:
        """Returns the description that the saved run gave."""
        try:
            content = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # unpickling has no closed list of errors
            raise TrainingError(f"{path} cannot be read ({error}); without --resume the run starts afresh") from error
        if content["format"] != FORMAT:
            raise TrainingError(f"{path} has format {content['format']}, this limner resumes {FORMAT}")
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise TrainingError(f"{path} is of another model or optimizer: {error}") from error
        self.average.load(content["average"])
        self.step, self.best = content["step"], content["best"]
        return content["run"]

    def averaged_model(self) -> Network:
        """A copy with the averaged weights, in evaluation mode."""
        model = checkpoint.build(self.recipe.spec())
        model.load_state_dict(self.average.state)
        return model.to(self.device).to(memory_format=torch.channels_last).eval()
