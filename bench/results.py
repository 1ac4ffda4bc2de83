"""Pages and measurements on disk: written aside and renamed, so that what is there is whole."""

import json
import os
from pathlib import Path
from typing import Any


def publish(text: str, where: Path | None) -> None:
    """Prints a page, and writes it to `where`, if that is given."""
    print(text)
    if where:
        _write(where, text)


def keep(path: Path, content: Any) -> None:
    """`content` as JSON."""
    _write(path, json.dumps(content))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)
