"""Prometheus' configuration, the alerts and the dashboard, held to what the running service exposes."""

import json
import math
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.operations.conftest import Served
from tests.operations.dashboard import FILE, MONITORING, Query, metric_names, queries
from tests.service.toy import wait_until

yaml = pytest.importorskip("yaml", reason='pip install -e ".[dev]"')
ROOT = MONITORING.parents[1]


def alerts() -> list[dict]:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def exposed(text: str) -> dict[str, set[str]]:
    """name -> labels, of every series; Triton's counters keep their names, to which this parser adds _total."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removesuffix("_total") if sample.name.startswith("nv_") else sample.name
            found.setdefault(name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def series(served: Served) -> dict[str, set[str]]:
    served.traffic()
    return exposed(served.metrics())


def test_the_dashboard_shows_what_it_should():
    shown = " ".join(query.panel.lower() for query in queries())
    for word in ("requests", "pictures run", "p95 by stage", "batch", "waiting", "rejected", "gpu", "rebuilt"):
        assert word in shown, word


@pytest.mark.parametrize("query", queries(), ids=lambda query: f"{query.panel}: {query.expression[:40]}")
def test_every_metric_and_label_of_the_dashboard_is_exposed(query: Query, series: dict[str, set[str]]):
    if query.of_gpu:
        assert "Empty without a GPU" in query.description
        return
    names = metric_names(query.filled("1m"))
    assert names <= series.keys(), names - series.keys()
    labels = set.intersection(*(series[name] for name in names)) | {"instance", "job", "le"}
    grouped = {label for group in re.findall(r"by \(([^)]*)\)", query.expression) for label in group.split(", ")}
    chosen = set(re.findall(r"(\w+)\s*(?:=~|!~|=|!=)\s*\"", query.expression))
    assert grouped | chosen <= labels, (grouped | chosen) - labels


def test_every_metric_of_the_alerts_is_exposed(series: dict[str, set[str]]):
    for rule in alerts():
        names = metric_names(rule["expr"]) - {"up"}
        if rule["expr"].startswith("limner_ready"):
            names = {"limner_ready"}
        assert names <= series.keys(), (rule["alert"], names - series.keys())


def test_the_page_names_every_alert():
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for rule in alerts():
        assert f"`{rule['alert']}`" in page
        assert {"summary", "description"} <= rule["annotations"].keys()


def test_the_dashboard_is_where_grafana_looks_for_it():
    """The paths of the provisioning, the compose file and the data source agree."""
    grafana = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]["grafana"]
    mounted = {target: Path(source) for source, target in (each.split(":")[:2] for each in grafana["volumes"])}
    (provider,) = yaml.safe_load((FILE.parents[1] / "provisioning/dashboards/files.yml").read_text())["providers"]
    assert ROOT / mounted[provider["options"]["path"]] == FILE.parent
    assert ROOT / mounted["/etc/grafana/provisioning"] == FILE.parents[1] / "provisioning"
    (source,) = yaml.safe_load((FILE.parents[1] / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    board = json.loads(FILE.read_text(encoding="utf-8"))
    used = {target["datasource"]["uid"] for panel in board["panels"] for target in panel.get("targets", [])}
    assert used == {source["uid"]}


def test_promtool_accepts_the_configuration_and_the_alerts_fire(program):
    """Fired and kept quiet on the series of alerts_test.yml."""
    promtool = program("promtool")
    for command in (("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")):
        done = subprocess.run([promtool, *command], cwd=MONITORING, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    tested = (MONITORING / "alerts_test.yml").read_text(encoding="utf-8")
    fired = {match for match in re.findall(r"alertname: (\w+)\n\s+exp_alerts", tested)}
    assert fired == {rule["alert"] for rule in alerts()}


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **asked: str) -> dict:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(asked)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).read()
        except OSError:
            return False
        return True


@pytest.fixture
def prometheus(served: Served, program, tmp_path: Path) -> Iterator[Prometheus]:
    """The real one, on the committed configuration but for whom it scrapes and how often."""
    binary = program("prometheus")
    configuration = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    configuration["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    for job in configuration["scrape_configs"]:
        del job["dns_sd_configs"]
        if job["job_name"] == "limner":
            job["static_configs"] = [{"targets": [served.address]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    (tmp_path / "alerts.yml").write_bytes((MONITORING / "alerts.yml").read_bytes())
    # It takes port 0 and tells nobody which one it got; the log does.
    command = [binary, "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--web.listen-address=127.0.0.1:0"]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=log, stdout=log)
        try:
            yield Prometheus(f"http://{_address(process, tmp_path / 'log')}")
        finally:
            process.terminate()
            process.wait(30)


def _address(process: subprocess.Popen, log: Path) -> str:
    pattern = re.compile(r"(?:address=|Listening on\"? (?:address=)?)(127\.0\.0\.1:[1-9]\d*)")
    end = time.monotonic() + 60
    while not (found := pattern.search(log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    return found[1]


def test_prometheus_scrapes_the_service_and_every_panel_has_data(served: Served, prometheus: Prometheus):
    wait_until(prometheus.answers, seconds=60)
    wanted = {query.filled("10s"): query.panel for query in queries() if not query.of_gpu}

    def missing() -> dict[str, str]:
        """Queries that have no number yet: a rate wants two scrapes with requests between them."""
        return {asked: panel for asked, panel in wanted.items() if not _has_number(prometheus, asked)}

    end = time.monotonic() + 90
    while lacking := missing():
        assert time.monotonic() < end, lacking
        served.traffic()
    (target,) = prometheus.get("/api/v1/targets", state="active")["activeTargets"]
    assert target["health"] == "up", target["lastError"]
    rules = [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in alerts()}
    assert not [rule["lastError"] for rule in rules if rule["health"] == "err"]


def _has_number(prometheus: Prometheus, asked: str) -> bool:
    found = prometheus.get("/api/v1/query", query=asked)["result"]
    return any(not math.isnan(float(series["value"][1])) for series in found)
