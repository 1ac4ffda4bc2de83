"""The kernels compiled by NVRTC, through ctypes: nothing is needed but libnvrtc, which torch with CUDA brings along.

Results are kept in memory and on disk, named by the hash of all that they follow from.
"""

import ctypes
import ctypes.util
import functools
import hashlib
import importlib.util
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent
# Without --fmad=false a product and a sum become one rounding, and the bits are no longer the eager op's.
OPTIONS = ("--std=c++17", "--fmad=false")
CACHE = "LIMNER_KERNEL_CACHE"  # a directory; else under the user's cache
_lock = threading.Lock()
_memory: dict[str, bytes] = {}


class KernelError(RuntimeError):
    """A kernel could not be compiled, loaded or launched; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Ptx:
    text: str
    kernels: tuple[str, ...]  # its entry points

    @property
    def isa(self) -> tuple[int, int]:
        """The PTX version, which a driver must know: CUDA 13.0's knows 9.0."""
        major, minor = re.findall(r"^\.version (\d+)\.(\d+)", self.text, re.MULTILINE)[0]
        return int(major), int(minor)


def compile_ptx(source_name: str, arch: str = "compute_90", defines: Mapping[str, str | int | float] = {}) -> Ptx:
    """PTX of `source_name`, one of the .cu files here without its suffix. `arch` is compute_80 to compute_120."""
    text = _compiled(source_name, arch, defines, "PTX").rstrip(b"\0").decode()
    return Ptx(text, tuple(re.findall(r"^\s*(?:\.visible )?\.entry (\w+)", text, re.MULTILINE)))


def compile_cubin(source_name: str, arch: str, defines: Mapping[str, str | int | float]) -> bytes:
    """Machine code for `arch`, sm_80 to sm_120: no driver has to know the compiler's PTX."""
    return _compiled(source_name, arch, defines, "CUBIN")


def _compiled(source_name: str, arch: str, defines: Mapping[str, str | int | float], form: str) -> bytes:
    path = SOURCES / f"{source_name}.cu"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SOURCES.glob("*.cu")))
        raise KernelError(f"no kernel source {source_name}: there are {known}")
    options = [*OPTIONS, f"--gpu-architecture={arch}", *(f"-D{k}={v}" for k, v in sorted(defines.items()))]
    headers = {p.name: p.read_text() for p in sorted(SOURCES.glob("*.cuh"))}
    source = path.read_text()
    library, version = _library()
    parts = [form, str(version), *options, source, *headers.values()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    with _lock:
        if key not in _memory:
            stored = _cache_directory() / f"{source_name}-{key[:32]}.{form.lower()}"
            found = _read(stored)
            if found is None:
                found = _run(library, source, f"{source_name}.cu", headers, options, form)
                _write(stored, found)
            _memory[key] = found
        return _memory[key]


def _run(
    library: ctypes.CDLL, source: str, name: str, headers: Mapping[str, str], options: list[str], form: str
) -> bytes:
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    names = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers))
    _check(
        library,
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names
        ),
    )  # fmt: skip
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), arguments):
            raise KernelError(f"NVRTC does not compile {name} with {options}:\n{_text(library, program, 'ProgramLog')}")
        return _bytes(library, program, form)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    """nvrtcGet<what>, whose size is nvrtcGet<what>Size."""
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    return _bytes(library, program, what).rstrip(b"\0").decode(errors="replace").strip()


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise KernelError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")


@functools.cache
def _library() -> tuple[ctypes.CDLL, tuple[int, int]]:
    """libnvrtc and its version: of the CUDA wheels that torch brings, of torch itself, of a CUDA toolkit."""
    for candidate in _candidates():
        try:
            library = ctypes.CDLL(candidate)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
            return library, (major.value, minor.value)
    raise KernelError(
        "no libnvrtc, which compiles the CUDA kernels: install torch with CUDA, or `pip install 'limner[kernels]'`"
    )


def _candidates() -> list[str]:
    found: list[str] = []
    for package, folders in (("nvidia", ("cu*/lib", "cuda_nvrtc/lib")), ("torch", ("lib",))):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for folder in folders:
                paths = sorted(Path(root).glob(f"{folder}/libnvrtc*.so*"), reverse=True)
                found += [str(p) for p in paths if "builtins" not in p.name and ".alt." not in p.name]
    named = ctypes.util.find_library("nvrtc")
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "lib64" / "libnvrtc.so"
    return [*found, *([named] if named else []), str(toolkit)]


def _cache_directory() -> Path:
    if own := os.environ.get(CACHE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limner" / "kernels"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _write(path: Path, content: bytes) -> None:
    """Aside, then renamed. A cache that cannot be written costs the next process a second, nothing more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(aside, path)
    except OSError:
        pass
