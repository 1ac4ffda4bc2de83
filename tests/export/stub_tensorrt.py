"""`import tensorrt` without its libraries: the real Python bindings over three shared objects that do nothing.

The bindings need a few symbols to load; nothing can be built with them, but the decorators of `tensorrt.plugin` check
signatures, and shape expressions can be evaluated over an expression builder of our own.
"""

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = {
    "libnvinfer": [
        "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry", "getPluginRegistry",
    ],
    "libnvonnxparser": ["createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"],
    "libnvinfer_plugin": ["initLibNvInferPlugins"],
}  # fmt: skip


def missing() -> str:
    """Why it cannot be made here; empty where it can."""
    if find_spec("tensorrt_bindings") is None:
        return "needs the wheel tensorrt-cu13-bindings (pip install --no-deps tensorrt-cu13-bindings)"
    return "" if shutil.which("gcc") else "needs gcc"


def make(directory: Path) -> None:
    """A folder for PYTHONPATH in which `import tensorrt` works."""
    found = find_spec("tensorrt_bindings")
    assert found is not None
    assert found.submodule_search_locations is not None
    installed = Path(next(iter(found.submodule_search_locations)))
    bindings = directory / "tensorrt_bindings"
    shutil.copytree(installed, bindings)
    version = next(installed.parent.glob("tensorrt_*bindings-*.dist-info")).name.rpartition("bindings-")[2]
    for name, symbols in LIBRARIES.items():
        source = directory / f"{name}.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
        library = bindings / f"{name}.so.{version.partition('.')[0]}"
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
        subprocess.run(["gcc", *flags, str(source), "-o", str(library)], check=True)
    shim = directory / "tensorrt"
    (shim / "plugin").mkdir(parents=True)
    (shim / "__init__.py").write_text("from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n")
    (shim / "plugin" / "__init__.py").write_text("from tensorrt_bindings.plugin import *\n")
