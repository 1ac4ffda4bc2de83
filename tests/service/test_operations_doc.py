"""docs/operations.md, held to the code. Run as a program it writes the tables anew."""

import re
from pathlib import Path

import pytest

from service import metrics, settings
from service.security import FIXED_HEADERS, HEALTH_ROUTES
from service.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
TABLES = {"settings": settings.table, "metrics": metrics.table}


def block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def rewritten(text: str) -> str:
    for name, table in TABLES.items():
        text = block(name).sub(lambda found, table=table: f"{found[1]}{table()}\n{found[3]}", text)
    return text


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_complete_and_true(name: str) -> None:
    found = block(name).search(PAGE.read_text(encoding="utf-8"))
    assert found
    written, expected = found[2].splitlines(), TABLES[name]().splitlines()
    assert written == expected, "run python -m tests.service.test_operations_doc"


def test_the_settings_table_has_every_field() -> None:
    table = settings.table()
    for name, field in Settings.model_fields.items():
        assert f"| `LIMNER_{name.upper()}` |" in table
        assert field.description
        assert field.description in table


def test_what_the_text_says_of_routes_and_headers() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for route in ("/healthz", "/readyz"):
        assert route in HEALTH_ROUTES
        assert f"`{route}`" in text
    for name in FIXED_HEADERS:
        assert name in text
    for variable in re.findall(r"LIMNER_([A-Z_]+)", text):
        assert variable.lower() in Settings.model_fields or variable == "_", variable


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
