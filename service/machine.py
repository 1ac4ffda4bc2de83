"""What this machine has: its processor as the engines see it, memory, runtimes, graphics cards. Facts only, as JSON.

Nothing here raises for what is absent: that is a finding.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

from service.engines import EngineChoice

Facts = dict[str, Any]


def limner_version() -> str:
    try:
        return importlib.metadata.version("limner")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "0+checkout"


# What makes convolutions fast, by the names that Linux gives; the last three compute in bfloat16.
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}
# Module, its distribution, and the extra that brings it.
OPTIONAL = (
    ("av", "av", "video"),
    ("httpx", "httpx", "client"),
    ("opentelemetry", "opentelemetry-sdk", "otel"),
    ("onnx", "onnx", "export"),
    ("torch", "torch", "train"),
)


def python() -> Facts:
    return {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()}


def cpu() -> Facts:
    lines = _read("/proc/cpuinfo").splitlines()
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = told.get("flags", told.get("Features", "")).split()
    return {
        "model": told.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "features": [name for name in FEATURES if name in flags] if flags else None,  # None: this system does not say
    }


def memory() -> Facts:
    """Bytes; None where the system does not say. `limit_bytes` is a container's."""
    told = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    total, available = (int(told[name].split()[0]) * 1024 if name in told else None
                        for name in ("MemTotal", "MemAvailable"))  # fmt: skip
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return {"total_bytes": total, "available_bytes": available, "limit_bytes": int(limit) if limit.isdigit() else None}


def engines() -> list[Facts]:
    return [_engine(name) for name in get_args(EngineChoice) if name in RUNTIMES]


def _engine(name: str) -> Facts:
    """Imported, as a runtime may be installed and broken."""
    if importlib.util.find_spec(RUNTIMES[name]) is None:
        return {
            "name": name,
            "installed": False,
            "works": False,
            "reason": f"not installed: pip install {RUNTIMES[name]}",
        }
    try:
        runtime = importlib.import_module(RUNTIMES[name])
        seen = _seen_by(name, runtime)
        return {"name": name, "installed": True, "works": True, "version": runtime.__version__, **seen}
    except Exception as error:  # a broken library raises whatever it likes
        return {"name": name, "installed": True, "works": False, "reason": f"{type(error).__name__}: {error}"}


def _seen_by(name: str, runtime: Any) -> Facts:
    if name == "openvino":
        core = runtime.Core()
        found = list(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")) if "CPU" in core.available_devices else []
        return {
            "devices": list(core.available_devices),
            "cpu_precisions": [each for each in found if each[-1:].isdigit()],
        }
    return {"devices": list(runtime.get_available_providers())}


def graphics() -> Facts:
    """NVIDIA cards, and what is there of their software."""
    cards, reason = _cards()
    parts = {"tensorrt": _version("tensorrt", "tensorrt"), "cuda-python": _version("cuda", "cuda-python")}
    return {"cards": cards, "reason": reason, **parts}


def _cards() -> tuple[list[Facts], str | None]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], "nvidia-smi is not found: no NVIDIA driver is installed, or the container was started without it"
    asked = ("name", "driver_version", "memory.total", "compute_cap")
    command = [program, f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer ({error})"
    if done.returncode:
        return [], f"nvidia-smi fails: {(done.stdout + done.stderr).strip()[:200]}"
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(asked, row, strict=False)) for row in rows], None if rows else "there is no card"


def optional() -> list[Facts]:
    """What extras bring; looked up, not imported."""
    return [{"module": name, "extra": extra, "version": _version(name, package)} for name, package, extra in OPTIONAL]


def _version(module: str, distribution: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
