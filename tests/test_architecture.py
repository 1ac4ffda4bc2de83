"""The rules of docs/architecture.md, held by the test run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("service", "models", "training", "export")
SOURCES = sorted([*(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")), ROOT / "limner.py"])

BLOCK_TORCH = """
import importlib.abc, pkgutil, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
import limner, service
OWN_RUNTIME = {{  # loaded where it is installed
    "tensorrt": ["service.engines.tensorrt"],
    "torch": ["service.aoti.devices", "service.aoti.ops", "service.aoti.runner", "service.engines.aoti"],
}}
for module in pkgutil.walk_packages(service.__path__, "service."):
    try:
        __import__(module.name)
    except ModuleNotFoundError as error:
        if module.name not in OWN_RUNTIME.get(error.name, ()):
            raise
assert not {{name.partition(".")[0] for name in sys.modules}} & {blocked}
"""


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def tool(name: str) -> str:
    """Beside this interpreter first: the environment's own, not whichever the machine has."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f'{name} is not installed: pip install -e ".[dev]"')
    return found


def test_the_service_imports_without_torch_and_the_rest_of_the_repository():
    blocked = {"torch", "torchvision", "models", "training", "export", "onnx", "pycocotools"}
    run(sys.executable, "-c", BLOCK_TORCH.format(blocked=blocked))


def test_import_directions():
    run(tool("lint-imports"), "--no-cache")


def test_ruff():
    run(tool("ruff"), "check", ".")
    run(tool("ruff"), "format", "--check", ".")


def test_pyright():
    run(tool("pyright"), "--pythonpath", sys.executable)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path: Path):
    text = path.read_text()
    length = len(text.splitlines())
    assert length <= 450, f"{length} lines: split it where it holds two ideas"
    if text.strip():
        assert text.startswith('"""'), "a module says in its docstring what it owns"


def tracked() -> list[Path]:
    """What is, or would be, committed."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def test_nothing_of_the_machine_it_was_written_on():
    # Written in pieces, so that this file does not find itself.
    patterns = ["/" + r"work/(main|shared|dev|\.)", "/" + r"home/\w+/", "/" + r"Users/\w+/", "/" + "root/"]
    personal = re.compile("|".join(patterns).encode())
    text_files = [path for path in tracked() if b"\0" not in path.read_bytes()[:8000]]
    found = [str(path.relative_to(ROOT)) for path in text_files if personal.search(path.read_bytes())]
    assert not found
