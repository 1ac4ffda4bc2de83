"""What runs a bundle's graphs, behind one protocol; and the golden check that every engine must pass.

B images, D detections, N RoIs, J joints. Features are opaque: they belong to the engine that made them, may live on its
device, and stay valid for as long as the `Detected` that holds them. An engine is called from one thread at a time. It
knows canvases and RoIs; it does not know requests, batching policies or image coordinates.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from service.bundle import GOLDEN, Bundle, StageName
from service.engines import plans
from service.engines.plans import PackageSet, PlanSet
from service.errors import BundleError, EngineMismatch, EngineUnavailable

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

EngineChoice = Literal["auto", "onnx", "openvino", "tensorrt", "aoti"]
Precision = Literal["float32", "float16", "bfloat16", "int8"]
FASTEST: tuple[Precision, ...] = ("float16", "bfloat16", "float32")  # on a GPU; the certificate found each good enough
PrecisionChoice = Literal["auto", "float32", "float16", "bfloat16", "int8"]


@dataclass(frozen=True, slots=True)
class Detected:
    """count (B,), boxes (B, D, 4) on the canvas, scores (B, D) descending, labels (B, D); the rest is padding."""

    count: Integers
    boxes: Floats
    scores: Floats
    labels: Integers
    features: Any


class Engine(Protocol):
    """One that takes fixed shapes also has `max_batch`, the most pictures of a batch, `canvases`, the shapes that it
    pads to, and `golden_file`, golden outputs on one of them: at its border a picture is computed otherwise elsewhere.

    `detect` is given `proposals` (B, R, 4) on the canvas by bundles that take them; rows without area are padding.
    """

    name: str
    precision: Precision

    def detect(self, images: npt.NDArray[np.uint8], sizes: Integers, *proposals: Floats) -> Detected: ...
    def masks(self, features: Any, rois: Floats, labels: Integers) -> Floats: ...
    def keypoints(self, features: Any, rois: Floats) -> Floats: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine and, in words, why it was this one. `split(n)`, where a runtime can, gives n engines that may run at
    once, each with its part of the `threads`; they share their weights as far as the runtime shares them. `is_portable`
    says that another process can open the same by the engine's name and precision."""

    engine: Engine
    reason: str
    threads: int = 1
    split: Callable[[int], Sequence[Engine]] | None = None
    is_portable: bool = False


def open_engine(
    bundle: Bundle, choice: EngineChoice, threads: int = 0, precision: PrecisionChoice = "float32"
) -> Opened:
    """`threads` 0 means all cores. A `precision` of auto is that of the artifacts for this GPU, and float32 elsewhere.

    Each runtime is imported only when it is chosen. auto takes the first that fits this machine, and says why it was
    none of those before it: TensorRT, AOTInductor, ONNX Runtime on CUDA, OpenVINO, ONNX Runtime on the processor.
    """
    if bundle.manifest.cascade is not None:  # whatever is chosen for graphs
        from service.engines.cascade import CascadeEngine

        cascade = CascadeEngine(bundle)
        return Opened(cascade, "the bundle is a cascade", threads or num_cores(), cascade.split)
    if choice == "tensorrt":
        return Opened(_tensorrt(bundle, precision), "LIMNER_ENGINE=tensorrt")
    if choice == "aoti":
        return Opened(_aoti(bundle, precision), "LIMNER_ENGINE=aoti")
    threads = threads or num_cores()
    refused = ""
    if choice == "auto":
        for name, reason, engine in on_gpu(bundle, precision):
            try:
                return Opened(engine(), f"auto: {reason}{refused}")
            except EngineUnavailable as error:
                refused += f"; not {name}: {error.detail}"
    name, reason = _choose(choice)
    return _on_processor(bundle, name, reason + refused, refused, threads, precision)


def on_gpu(bundle: Bundle, precision: PrecisionChoice) -> list[tuple[str, str, Callable[[], Engine]]]:
    """What auto tries first: a name, why it would be taken, and the engine, or `EngineUnavailable`."""
    return [
        ("tensorrt", "the bundle has TensorRT plans for this GPU", lambda: _tensorrt(bundle, precision)),
        ("aoti", "the bundle has AOTInductor packages for this GPU", lambda: _aoti(bundle, precision, True)),
        ("onnx on CUDA", "ONNX Runtime has CUDA here", lambda: _onnx_on_cuda(bundle, precision)),
    ]


def _on_processor(
    bundle: Bundle, name: str, reason: str, refused: str, threads: int, precision: PrecisionChoice
) -> Opened:
    """The engines for the portable graphs."""
    if precision == "int8" and not bundle.has_int8:
        raise EngineUnavailable(
            f"{bundle.name}/{bundle.version} has no graphs in int8: make them with `limner export int8`, "
            "or set LIMNER_PRECISION=float32"
        )
    if name == "openvino":
        from service.engines.openvino import OpenvinoEngine

        if precision == "float16":
            raise EngineUnavailable("the openvino engine computes in float32, bfloat16 or int8, not float16" + refused)
        engine = OpenvinoEngine(bundle, threads, "float32" if precision == "auto" else precision)
        return Opened(engine, reason, threads, engine.split, is_portable=os.name == "posix")
    if not refused:  # asked for by name: on the GPU where it can be
        try:
            return Opened(_onnx_on_cuda(bundle, precision), f"{reason}, on CUDA")
        except EngineUnavailable as error:
            reason += f", on the processor: {error.detail}"
    _only_float32(precision, refused)
    from service.engines.onnx import OnnxEngine

    engine = OnnxEngine(bundle, threads)
    return Opened(engine, reason, threads, engine.split, is_portable=os.name == "posix")


def _only_float32(precision: PrecisionChoice, refused: str = "") -> None:
    if precision not in ("auto", "float32"):
        raise EngineUnavailable(
            f"the onnx engine computes in float32, not {precision}: "
            f"set LIMNER_PRECISION=float32 or LIMNER_ENGINE=openvino{refused}"
        )


def _onnx_on_cuda(bundle: Bundle, precision: PrecisionChoice) -> Engine:
    """The last resort on a GPU: the portable graphs, in float32."""
    _only_float32(precision)
    if importlib.util.find_spec("onnxruntime") is None:
        raise EngineUnavailable("onnxruntime is not installed")
    from service.engines.onnx import OnnxEngine, refuse_without_cuda

    refuse_without_cuda()
    return OnnxEngine(bundle, device="cuda")


def num_cores() -> int:
    """That this process may use; a quota of a container shows only in what is measured."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tensorrt(bundle: Bundle, precision: PrecisionChoice) -> Engine:
    """Raises `EngineUnavailable` with the first reason why there is none."""
    # Before any runtime is asked: most bundles have none.
    found = [each for each in plans.listed(bundle) if precision in ("auto", each.plans.precision)]
    if not found:
        kind = "" if precision == "auto" else f"{precision} "
        raise EngineUnavailable(f"the bundle has no {kind}TensorRT plans (limner export trt makes them)")
    if importlib.util.find_spec("tensorrt") is None:
        raise EngineUnavailable("tensorrt is not installed")
    from service.engines.cuda import Cuda

    cuda = Cuda()
    try:
        chosen = _plans_for(found, cuda.compute_capability())
        engine_class = _tensorrt_engine(chosen.plans.tensorrt)
    except BaseException:
        cuda.close()
        raise
    return engine_class(bundle, *chosen, cuda)


def _plans_for(found: list[PlanSet], gpu: str) -> PlanSet:
    """Those for this GPU; of several precisions the fastest."""
    here = [each for each in found if each.plans.gpu == gpu]
    if not here:
        known = ", ".join(sorted({each.plans.gpu for each in found}))
        raise EngineUnavailable(f"the TensorRT plans are for {known}, this GPU is {gpu}")
    return min(here, key=lambda each: FASTEST.index(each.plans.precision))


def _tensorrt_engine(made_with: str) -> Callable[..., Engine]:
    try:
        here: Any = importlib.import_module("tensorrt")

        from service.engines.tensorrt import TensorrtEngine
    except (ImportError, OSError) as error:  # the wheel without its libraries
        raise EngineUnavailable(f"tensorrt cannot be imported ({error})") from None
    if here.__version__ != made_with:
        raise EngineUnavailable(
            f"the plans were made with TensorRT {made_with}, here is {here.__version__}: "
            "install that one, or make them again with limner export trt"
        )
    return TensorrtEngine


def _aoti(bundle: Bundle, precision: PrecisionChoice, only_gpu: bool = False) -> Engine:
    """Of several that fit this machine the fastest. Raises `EngineUnavailable` with the first reason why there is none.

    `only_gpu`: packages for the processor are slower there than OpenVINO, and only run when asked for by name.
    """
    found = [
        each
        for each in plans.packages(bundle)
        if precision in ("auto", each.packages.precision) and not (only_gpu and each.packages.gpu == "cpu")
    ]
    if not found:
        kind = "" if precision == "auto" else f"{precision} "
        device = " for a GPU" if only_gpu else ""
        raise EngineUnavailable(f"the bundle has no {kind}AOTInductor packages{device} (limner export aoti makes them)")
    if importlib.util.find_spec("torch") is None:
        raise EngineUnavailable("torch, which AOTInductor's packages need, is not installed")
    try:
        from service.engines.aoti import AotiEngine, refuse_elsewhere
    except (ImportError, OSError) as error:  # a wheel without its libraries
        raise EngineUnavailable(f"torch cannot be imported ({error})") from None
    here, reasons = list[PackageSet](), list[str]()
    for each in found:
        try:
            refuse_elsewhere(each.packages)
            here.append(each)
        except EngineUnavailable as error:
            reasons.append(error.detail)
    if not here:
        raise EngineUnavailable(reasons[0])
    # A GPU's before the processor's.
    chosen = min(here, key=lambda each: (each.packages.gpu == "cpu", FASTEST.index(each.packages.precision)))
    return AotiEngine(bundle, *chosen)


def check_outputs(bundle: Bundle, stage: StageName, found: set[str]) -> None:
    """For engines, as they load a graph: it gives what the manifest promises."""
    if missing := {port.name for port in bundle.manifest.stages[stage].outputs} - found:
        raise BundleError(f"{bundle.stage_file(stage)} lacks the outputs {sorted(missing)}: export the bundle again")


def _choose(choice: EngineChoice) -> tuple[str, str]:
    """Of the engines for the portable graphs."""
    runtimes = {"onnx": "onnxruntime", "openvino": "openvino"}
    if choice == "auto":
        if importlib.util.find_spec("openvino") is not None:
            return "openvino", "auto: openvino is installed, and the faster one on CPUs"
        return "onnx", "auto: openvino is not installed"
    if importlib.util.find_spec(runtimes[choice]) is None:
        raise EngineUnavailable(
            f"LIMNER_ENGINE={choice} but {runtimes[choice]} is not installed: install it or set LIMNER_ENGINE=auto"
        )
    return choice, f"LIMNER_ENGINE={choice}"


@dataclass(frozen=True, slots=True)
class Bars:
    """How far an engine may stray from the golden outputs."""

    box_px: float
    score: float
    mask: float
    heatmap_fraction: float  # of the golden heatmaps' largest magnitude


# float32: kernels sum in another order, nothing else. bfloat16 keeps 8 bits of mantissa, so features differ by up to
# 0.4 % a layer: scores and mask edges move, and a box of some hundred pixels moves by a pixel or two. float16 keeps 11.
# int8 is held to what the same graphs gave when they were made; a sum in another order may round to the next step.
BARS: dict[Precision, Bars] = {
    "float32": Bars(box_px=0.05, score=1e-3, mask=5e-3, heatmap_fraction=5e-3),
    "float16": Bars(box_px=0.5, score=0.02, mask=0.05, heatmap_fraction=0.02),
    "bfloat16": Bars(box_px=2.0, score=0.05, mask=0.15, heatmap_fraction=0.1),
    "int8": Bars(box_px=2.0, score=0.05, mask=0.15, heatmap_fraction=0.1),
}


@dataclass(frozen=True, slots=True)
class Agreement:
    """The largest differences found by the golden check."""

    num_matched: int
    num_unmatched: int
    box_px: float
    score: float
    mask: float | None = None
    heatmap_fraction: float | None = None


def verify_golden(engine: Engine, bundle: Bundle) -> Agreement:
    """Runs every stage on golden.npz; raises `EngineMismatch`, which says by how much, if one strays past its bar."""
    golden = bundle.golden(getattr(engine, "golden_file", GOLDEN))
    bars = BARS[engine.precision]
    floor = bundle.manifest.thresholds.score_floor
    detected = engine.detect(*golden_inputs(golden))
    agreement = _compare_heads(engine, bundle, golden, detected, _compare_boxes(golden, detected, bars, floor))
    strayed = _strayed(agreement, bars)
    if strayed:
        raise EngineMismatch(
            f"{bundle.name}/{bundle.version} on {engine.name} ({engine.precision}): {'; '.join(strayed)}. "
            "Export the bundle again, or choose another LIMNER_ENGINE or LIMNER_PRECISION"
        )
    return agreement


def golden_inputs(golden: dict[str, npt.NDArray[Any]], copies: int = 0) -> list[npt.NDArray[Any]]:
    """What `detect` is given: the golden batch, or so many copies of its first picture."""
    names = [name for name in ("images", "sizes", "proposals") if name in golden]
    return [np.repeat(golden[name][:1], copies, axis=0) if copies else golden[name] for name in names]


def golden_rois(golden: dict[str, npt.NDArray[Any]]) -> tuple[Floats, Integers]:
    """The RoIs (N, 5) and labels (N,) that the golden head outputs belong to: every detection, image by image."""
    counts = golden["count"]
    rois = [
        np.concatenate([np.full((count, 1), index, np.float32), golden["boxes"][index, :count]], axis=1)
        for index, count in enumerate(counts)
    ]
    labels = [golden["labels"][index, :count] for index, count in enumerate(counts)]
    return np.concatenate(rois).astype(np.float32), np.concatenate(labels).astype(np.int64)


def _compare_boxes(golden: dict[str, npt.NDArray[Any]], detected: Detected, bars: Bars, floor: float) -> Agreement:
    matched = unmatched = 0
    box_px = score = 0.0
    for index, count in enumerate(golden["count"]):
        wanted = (golden[name][index, :count] for name in ("boxes", "scores", "labels"))
        num = int(detected.count[index])
        found = (detected.boxes[index, :num], detected.scores[index, :num], detected.labels[index, :num])
        pairs, alone = _match(tuple(wanted), found, _entry_score(golden["scores"][index], floor) + bars.score)
        matched, unmatched = matched + len(pairs), unmatched + alone
        box_px = max([box_px, *(pair[0] for pair in pairs)])
        score = max([score, *(pair[1] for pair in pairs)])
    return Agreement(matched, unmatched, box_px, score)


Rows = tuple[npt.NDArray[Any], ...]


def _entry_score(scores: Floats, floor: float) -> float:
    """The score that decides who is in: the floor, or the last one's where every slot is taken."""
    return max(floor, float(scores[-1]))


def _match(wanted: Rows, found: Rows, in_doubt: float) -> tuple[list[tuple[float, float]], int]:
    """Pairs the detections of one image by label and nearest box: neighbours of equal score may swap places.

    Gives the pairs' differences in box and score, and how many scores above `in_doubt` found no partner.
    """
    wanted, found = ((boxes, scores.copy(), labels) for boxes, scores, labels in (wanted, found))
    gaps = np.abs(wanted[0][:, None, :] - found[0][None, :, :]).max(axis=2, initial=0.0)
    gaps[wanted[2][:, None] != found[2][None, :]] = np.inf
    pairs: list[tuple[float, float]] = []
    for _ in range(min(gaps.shape)):
        row, column = np.unravel_index(int(np.argmin(gaps)), gaps.shape)
        if not gaps[row, column] < np.inf:
            break
        pairs.append((float(gaps[row, column]), abs(float(wanted[1][row]) - float(found[1][column]))))
        gaps[row, :] = gaps[:, column] = np.inf
        wanted[1][row] = found[1][column] = np.nan
    left = np.concatenate([scores[~np.isnan(scores)] for scores in (wanted[1], found[1])])
    return pairs, int((left > in_doubt).sum())


def _compare_heads(
    engine: Engine, bundle: Bundle, golden: dict[str, npt.NDArray[Any]], detected: Detected, so_far: Agreement
) -> Agreement:
    rois, labels = golden_rois(golden)
    mask = heatmap = None
    if bundle.has_masks and len(rois):
        mask = _gap(engine.masks(detected.features, rois, labels), golden["probabilities"])
    if bundle.has_keypoints and len(rois):
        expected = golden["heatmaps"]
        heatmap = _gap(engine.keypoints(detected.features, rois), expected) / max(1.0, float(np.abs(expected).max()))
    return Agreement(so_far.num_matched, so_far.num_unmatched, so_far.box_px, so_far.score, mask, heatmap)


def _gap(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max(initial=0.0))


def _strayed(agreement: Agreement, bars: Bars) -> list[str]:
    told = []
    if agreement.num_unmatched:
        told.append(f"{agreement.num_unmatched} detections have no partner beside {agreement.num_matched} that do")
    for name, unit in (("box_px", "px"), ("score", ""), ("mask", ""), ("heatmap_fraction", "")):
        value, bar = getattr(agreement, name), getattr(bars, name)
        # `not <=` rather than `>`: NaN must stray too.
        if value is not None and not value <= bar:
            told.append(f"{name} differs by {value:.4g}{unit}, at most {bar:g}{unit} is allowed")
    return told
