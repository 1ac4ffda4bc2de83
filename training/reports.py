"""What a run tells: a progress bar or plain lines, TensorBoard scalars, and `metrics.jsonl` for programs."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Reports:
    """`every`: steps between lines; the file gets every step."""

    def __init__(self, directory: Path, start: int, steps: int, every: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.start, self.steps, self.every = start, steps, every
        _truncate(directory / "metrics.jsonl", start)
        self.file = (directory / "metrics.jsonl").open("a", buffering=1)
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=start or None)
        self.bar = tqdm(total=steps, initial=start, unit="step", smoothing=0.05) if sys.stderr.isatty() else None
        self.began = time.monotonic()
        self.smooth: dict[str, float] = {}

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Step `step` (counted from 1) is done."""
        self.file.write(json.dumps({"step": step, **{name: round(value, 6) for name, value in values.items()}}) + "\n")
        for name, value in values.items():
            self.smooth[name] = value + 0.95 * (self.smooth.get(name, value) - value)
        if self.bar:
            self.bar.update()
        if step % self.every == 0 or step == self.steps:
            for name, value in values.items():
                self.board.add_scalar(f"train/{name}", value, step)
            self._tell(step)

    def evaluated(self, step: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        self.file.write(json.dumps({"step": step, "evaluation": scores}) + "\n")
        for kind, numbers in scores.items():
            for name, value in numbers.items():
                self.board.add_scalar(f"{kind}/{name}", value, step)
        told = ", ".join(f"{kind} AP {numbers['AP']:.4f}" for kind, numbers in scores.items())
        self.say(f"step {step}: {told}")

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        self.file.close()
        self.board.close()
        if self.bar:
            self.bar.close()

    def _tell(self, step: int) -> None:
        losses = " ".join(f"{name} {value:.3g}" for name, value in self.smooth.items())
        if self.bar:
            self.bar.set_postfix_str(losses)
            return
        seconds = (time.monotonic() - self.began) / max(1, step - self.start)
        left = _clock(seconds * (self.steps - step))
        print(f"{step}/{self.steps} {seconds:.2f} s/step, {left} left: {losses}", flush=True)


def _truncate(path: Path, step: int) -> None:
    """A resumed run repeats the steps after its last save; what they wrote the first time goes."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text().splitlines():
        try:
            entry: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # the run was killed while it wrote this line
        if entry["step"] <= step:
            kept.append(line + "\n")
    path.write_text("".join(kept))


def _clock(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes}:{int(seconds) % 60:02d} min"
