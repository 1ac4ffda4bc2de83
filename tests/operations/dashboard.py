"""What the provisioned dashboard asks Prometheus."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

MONITORING = Path(__file__).parents[2] / "docker" / "monitoring"
FILE = MONITORING / "grafana" / "dashboards" / "limner.json"
GPU = "DCGM_"


@dataclass(frozen=True, slots=True)
class Query:
    panel: str
    expression: str
    description: str

    @property
    def of_gpu(self) -> bool:
        return GPU in self.expression

    def filled(self, interval: str) -> str:
        """As Grafana sends it, with all instances and models chosen and `interval` for the rates."""
        asked = re.sub(r"\$(instance|model)\b", ".*", self.expression.replace("$__rate_interval", interval))
        assert "$" not in asked, asked
        return asked


def queries() -> list[Query]:
    board = json.loads(FILE.read_text(encoding="utf-8"))
    return [
        Query(panel["title"], target["expr"], panel.get("description", ""))
        for panel in board["panels"]
        for target in panel.get("targets", [])
    ]


def metric_names(expression: str) -> set[str]:
    """Names of series: words before { or [, which no function, label or value is."""
    return set(re.findall(r"([A-Za-z_:][A-Za-z0-9_:]*)\s*(?=[{\[])", expression)) or {expression}
