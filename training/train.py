"""`limner train`: fits a recipe's model to COCO-format data. Safe to stop at any time and to resume exactly."""

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import training.evaluate
from models import backbones, checkpoint
from models.network import Network
from models.proposed import ProposalNetwork
from service import proposals
from service.errors import ServiceError
from training.batches import Batches, batches_from
from training.compose import Composer
from training.data import Bytes, DataError, Floats, Item, Source, read_source
from training.engine import torch_detector
from training.recipes import RECIPES, Recipe
from training.reports import Reports
from training.trainer import Trainer, TrainingError

EXAMPLE = "Example: limner train person_heads --data coco=train2017:person_keypoints_train2017.json --out runs/heads"
OVERRIDES = {
    "steps": int, "batch_size": int, "base_lr": float, "warmup_steps": int, "weight_decay": float, "ema_decay": float,
    "clip_norm": float, "trunk_lr_multiplier": float, "freeze_until": str,
    "mosaic": float, "copy_paste": float, "jitter": float,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        return run(options)
    except (DataError, TrainingError, checkpoint.CheckpointError, ServiceError, OSError) as error:
        print(f"limner train: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="limner train", description=__doc__, epilog=EXAMPLE)
    add = parser.add_argument
    add("recipe", help=", ".join(RECIPES))
    add("--data", action="append", required=True, metavar="NAME=IMAGES:ANNOTATIONS[:WEIGHT]", help="may be repeated")
    add("--out", type=Path, required=True, help="folder for best/, last/, resume.pt and metrics")
    add("--resume", action="store_true", help="go on from OUT/resume.pt if there is one")
    add("--init", type=Path, metavar="CHECKPOINT", help="start from these weights where names and shapes agree")
    add("--trunk", type=Path, metavar="WEIGHTS", help="ImageNet weights for the trunk (torchvision, .pth)")
    add("--eval", metavar="IMAGES:ANNOTATIONS", help="evaluate on this")
    add("--eval-every", type=int, default=0, metavar="STEPS", help="and at the end; 0: only at the end")
    add("--save-every", type=int, default=500, metavar="STEPS")
    add("--cache", type=Path, metavar="DIR", help="for proposals and features of pictures; default: OUT/cache")
    add("--log-every", type=int, default=20, metavar="STEPS")
    add("--time-limit", type=float, default=0, metavar="SECONDS", help="save and stop after this long")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=0, help="of torch on the CPU; 0: torch's own choice")
    add("--workers", type=int, default=2, help="processes that prepare batches; results do not depend on it")
    add("--seed", type=int, default=0)
    add("--amp", action=argparse.BooleanOptionalAction, default=None, help="bfloat16; default: the recipe's, on a GPU")
    add("--classes", metavar="NAMES", help="comma-separated, instead of the recipe's")
    add("--lr", dest="base_lr", type=float)
    add(
        "--freeze-until",
        metavar="LAYER",
        help='leave the trunk before this layer as it is: layer2, conv3_1, fc6 (a wrong one lists them); "": nothing',
    )
    add(
        "--option",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help='of the architecture, instead of the recipe\'s; may be repeated: --option \'loss={"kind": "ohem"}\'',
    )
    add("--short-side", type=int, metavar="PIXELS", help="of the canvas, in training (one scale) and in use")
    for name, kind in OVERRIDES.items():
        if name not in ("base_lr", "freeze_until"):
            add(f"--{name.replace('_', '-')}", type=kind)
    return parser.parse_args(argv)


def resolve_recipe(options: argparse.Namespace) -> Recipe:
    """The named recipe with the command line's changes."""
    if options.recipe not in RECIPES:
        raise DataError(f"unknown recipe {options.recipe!r}; there are {', '.join(RECIPES)}")
    recipe = RECIPES[options.recipe]()
    given = {name: getattr(options, name) for name in OVERRIDES if getattr(options, name) is not None}
    if "batch_size" in given and "base_lr" not in given:
        given["base_lr"] = recipe.base_lr * given["batch_size"] / recipe.batch_size
    ours = {field.name for field in dataclasses.fields(recipe)}
    augmentation: dict[str, Any] = {name: value for name, value in given.items() if name not in ours}
    given = {name: value for name, value in given.items() if name in ours}
    if options.short_side:
        given["canvas"] = dataclasses.replace(recipe.canvas, short_side=options.short_side)
        augmentation["short_sides"] = ()
    if augmentation:
        given["augmentation"] = dataclasses.replace(recipe.augmentation, **augmentation)
    if options.classes:
        given["classes"] = tuple(options.classes.split(","))
    if options.option:
        given["options"] = recipe.options | dict(map(parse_option, options.option))
    given["amp"] = options.amp if options.amp is not None else recipe.amp and options.device.startswith("cuda")
    return dataclasses.replace(recipe, **given)


def parse_option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise DataError(f"--option {text}: expected NAME=JSON, and the JSON does not parse: {error}") from error


def run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    recipe = resolve_recipe(options)
    if options.init:
        recipe = with_ranks(recipe, options.init)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    sources = [Source.parse(text) for text in options.data]
    items = [item for source in sources for item in read_source(source, recipe.classes, recipe.keypoints)]
    evaluation = parse_evaluation(options.eval)
    cache = options.cache or options.out / "cache"
    propose = proposer(recipe, cache)
    dataset = make_batches(recipe, items, sources, options.seed, propose)
    try:
        trainer = Trainer(make_model(recipe, options), recipe, torch.device(options.device), options.seed)
    except ValueError as error:  # a layer that the trunk has not
        raise DataError(str(error)) from error
    description = describe(recipe, sources, options.seed)
    resume = options.out / "resume.pt"
    if options.resume and resume.exists():
        compare(trainer.load_resume(resume), description)
    reports = Reports(options.out, trainer.step, recipe.steps, options.log_every)
    reports.say(
        f"{recipe.name}: {len(items)} pictures, {dataset.steps_per_epoch} steps an epoch, at step {trainer.step}"
    )
    loop = Loop(trainer, reports, options, description, evaluation, began, cache)
    try:
        loop.run(dataset)
        if recipe.fits_machines and trainer.step >= recipe.steps:
            assert propose is not None
            loop.fit_machines(items, propose)
        return 0
    finally:
        reports.close()


class Loop:
    """Steps until done, out of time or told to stop; saves and evaluates on the way."""

    def __init__(
        self,
        trainer: Trainer,
        reports: Reports,
        options: argparse.Namespace,
        description: dict[str, Any],
        evaluation: tuple[Path, Path] | None,
        began: float,
        cache: Path,
    ) -> None:
        self.trainer, self.reports, self.options = trainer, reports, options
        self.description, self.evaluation, self.began, self.cache = description, evaluation, began, cache
        self.stopped = ""

    def run(self, dataset: Batches) -> None:
        trainer, options, steps = self.trainer, self.options, self.trainer.recipe.steps
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            pin = trainer.device.type == "cuda"
            for batch in batches_from(dataset, trainer.step, steps, options.workers, pin):
                values = trainer.advance(batch)
                self.reports.step(trainer.step, values)
                if options.eval_every and trainer.step % options.eval_every == 0 and trainer.step < steps:
                    self.evaluate()
                if trainer.step % options.save_every == 0:
                    self.save()
                if options.time_limit and time.monotonic() - self.began > options.time_limit:
                    self.stopped = "the time limit"
                if self.stopped:
                    break
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if trainer.step >= steps:
            self.evaluate()
        self.save()
        ended = f"stopped by {self.stopped}; --resume goes on" if trainer.step < steps else "done"
        self.reports.say(f"{ended}: {options.out}, step {trainer.step} of {steps}")

    def _stop(self, number: int, _: object) -> None:
        self.stopped = signal.Signals(number).name

    def save(self) -> None:
        self.options.out.mkdir(parents=True, exist_ok=True)
        self.trainer.save_resume(self.options.out / "resume.pt", self.description)
        self._save_checkpoint("last", self.trainer.averaged_model(), {})

    def evaluate(self) -> None:
        if not self.evaluation:
            return
        trainer, model = self.trainer, self.trainer.averaged_model()
        scores = self._scores(model, trainer.recipe.spec())
        # One number to rank checkpoints by: the mean over box, mask and keypoint AP.
        score = sum(numbers["AP"] for numbers in scores.values()) / max(1, len(scores))
        if score > trainer.best:
            trainer.best = score
            self._save_checkpoint("best", model, scores)

    def _scores(self, model: Network, spec: checkpoint.Spec) -> dict[str, Any]:
        assert self.evaluation is not None
        detector = torch_detector(model, spec)
        detector.propose = proposals.Cache(self.cache / "proposals")
        scores = training.evaluate.evaluate(detector, *self.evaluation)
        self.reports.evaluated(self.trainer.step, scores)
        return scores

    def fit_machines(self, items: list[Item], propose: Callable[[Bytes], Floats]) -> None:
        """The last steps of R-CNN and SPP-net, on what was fine-tuned, into `fitted`."""
        from training import svm

        model, spec = self.trainer.averaged_model(), self.trainer.recipe.spec()
        assert isinstance(model, ProposalNetwork)
        fitted, spec = svm.fit(model, spec, items, propose, self.cache / "features", self.reports.say)
        scores = self._scores(fitted, spec) if self.evaluation else {}
        self._save_checkpoint("fitted", fitted, scores, spec)
        self.reports.say(f"machines and ridge regression are fitted: {self.options.out / 'fitted'}")

    def _save_checkpoint(
        self, name: str, model: Network, scores: dict[str, Any], spec: checkpoint.Spec | None = None
    ) -> None:
        provenance = {**self.description, "step": self.trainer.step, "torch": torch.__version__, "ap": scores}
        checkpoint.save(self.options.out / name, model, spec or self.trainer.recipe.spec(), provenance)


def proposer(recipe: Recipe, cache: Path) -> Callable[[Bytes], Floats] | None:
    """Boxes (P, 4) of a picture, where the model takes any."""
    if recipe.proposals is None:
        return None
    if recipe.proposals.method == "selective_search":
        proposals.opencv("selective search", "ximgproc")  # now, rather than in a worker
    return partial(proposals.Cache(cache / "proposals"), rule=recipe.proposals)


def make_batches(
    recipe: Recipe,
    items: list[Item],
    sources: list[Source],
    seed: int,
    propose: Callable[[Bytes], Floats] | None = None,
) -> Batches:
    if not items:
        raise DataError("the data sets hold no pictures")
    weights = {source.name: source.weight for source in sources}
    if len(weights) < len(sources):
        raise DataError("two data sets have the same name")
    flips = recipe.keypoints.flips if recipe.keypoints else ()
    composer = Composer(items, weights, recipe.canvas, flips, recipe.augmentation, propose)
    return Batches(composer, weights, recipe.batch_size, seed)


def with_ranks(recipe: Recipe, init: Path) -> Recipe:
    """A checkpoint that `limner export svd` made trains on as it is, with its layers of low rank."""
    spec = checkpoint.read_spec(init)
    if spec.architecture != recipe.architecture or "ranks" not in spec.options:
        return recipe
    return dataclasses.replace(recipe, options={"ranks": spec.options["ranks"], **recipe.options})


def make_model(recipe: Recipe, options: argparse.Namespace) -> Network:
    torch.manual_seed(options.seed)
    model = checkpoint.build(recipe.spec())
    if options.trunk:
        try:
            backbones.read_trunk(options.trunk, model.classifier_trunk(), model.classifier_layers())
        except ValueError as error:
            raise DataError(str(error)) from error
    if options.init:
        print(f"{options.init}: {init_from(model, options.init)}", flush=True)
    return model


def init_from(model: Network, directory: Path) -> str:
    """Takes over what fits and says what did not."""
    ours, theirs = model.state_dict(), checkpoint.load(directory)[0].state_dict()
    fitting = {name: value for name, value in theirs.items() if name in ours and ours[name].shape == value.shape}
    if not fitting:
        raise DataError(f"--init {directory}: not one tensor of it fits this model")
    model.load_state_dict(fitting, strict=False)
    left = sorted(set(ours) - set(fitting))
    for name in left:
        deepen(name, ours, fitting)
    return f"{len(fitting)} tensors taken over" + (f", {len(left)} stay new: {', '.join(left[:8])}" if left else "")


def deepen(name: str, state: dict[str, torch.Tensor], taken: dict[str, torch.Tensor]) -> None:
    """A convolution added to a stack that was taken over starts as the identity, so that the deeper stack computes at
    first what the shallower did (Net2Net, Chen et al. 2016, section 2.3; exact, since what enters it passed a ReLU)."""
    stack, _, kind = name.rsplit(".", 2)
    if not stack.endswith("convs") or f"{stack}.0.weight" not in taken:
        return
    if kind == "bias":
        torch.nn.init.zeros_(state[name])
    elif state[name].dim() == 4 and state[name].shape[0] == state[name].shape[1]:
        torch.nn.init.dirac_(state[name])


def parse_evaluation(text: str | None) -> tuple[Path, Path] | None:
    if not text:
        return None
    images, colon, annotations = text.partition(":")
    if not colon or not Path(images).is_dir() or not Path(annotations).exists():
        raise DataError(f"--eval {text!r}: expected IMAGES_DIR:ANNOTATIONS, both of which exist")
    return Path(images), Path(annotations)


def describe(recipe: Recipe, sources: list[Source], seed: int) -> dict[str, Any]:
    """Everything that a run's numbers depend on, as plain values and without paths."""
    data = [{"name": s.name, "annotations": s.annotations.name, "weight": s.weight} for s in sources]
    return json.loads(json.dumps({"recipe": dataclasses.asdict(recipe), "data": data, "seed": seed}))


def compare(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    changed = [key for key in ours["recipe"] if saved["recipe"].get(key) != ours["recipe"][key]]
    changed += [key for key in ("data", "seed") if saved[key] != ours[key]]
    if changed:
        print(f"warning: another {', '.join(changed)}: this goes on as another run than was saved", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
