"""The manifests, held to the service's routes and settings, and to Kubernetes' own schemas where installed."""

import re
from pathlib import Path
from typing import Any

import pytest

from service.app import create_app
from service.settings import Settings

yaml = pytest.importorskip("yaml", reason='pip install -e ".[dev]"')

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "docker" / "kubernetes"
NO_OBJECTS = {"kustomization.yaml", "prometheus-adapter.yaml"}  # settings of kustomize and of a Helm chart


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DIRECTORY / name).read_text(encoding="utf-8")))


OBJECTS = [
    (f"{path.name}: {each['kind']}", each)
    for path in sorted(DIRECTORY.glob("*.yaml"))
    if path.name not in NO_OBJECTS
    for each in documents(path.name)
]
BY_KIND = {each["kind"]: each for _, each in OBJECTS}
POD = BY_KIND["Deployment"]["spec"]["template"]
RUNTIME = BY_KIND["ServingRuntime"]["spec"]
CONTAINERS = [POD["spec"]["containers"][0], RUNTIME["containers"][0]]


def image_variables() -> dict[str, str]:
    text = (ROOT / "docker" / "service-cpu.Dockerfile").read_text(encoding="utf-8")
    return dict(re.findall(r"(LIMNER_\w+)=(\S+)", text))


PORT = int(image_variables()["LIMNER_PORT"])


@pytest.mark.parametrize("each", [each for _, each in OBJECTS], ids=[name for name, _ in OBJECTS])
def test_the_schemas_of_kubernetes_accept_it(each: dict[str, Any]):
    validate = pytest.importorskip("kubernetes_validate", reason='pip install -e ".[kubernetes]"')
    if each["apiVersion"].startswith("serving.kserve.io"):
        # KServe's own kinds are not Kubernetes'; their containers are.
        pod = {"containers": RUNTIME["containers"], "volumes": RUNTIME["volumes"]}
        each = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
    validate.validate(each, validate.latest_version(), strict=True)


def test_a_wrong_field_would_be_found():
    validate = pytest.importorskip("kubernetes_validate", reason='pip install -e ".[kubernetes]"')
    wrong = {**BY_KIND["Service"], "spec": {**BY_KIND["Service"]["spec"], "prots": []}}
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, validate.latest_version(), strict=True)


@pytest.mark.parametrize("container", CONTAINERS, ids=["deployment", "kserve"])
def test_probes_ask_routes_that_exist_and_need_no_key(container: dict[str, Any], tmp_path: Path):
    from service.security import HEALTH_ROUTES

    # Routers that are included keep routes of their own in newer versions of FastAPI: the document has all.
    routes = create_app(Settings(bundles=tmp_path)).openapi()["paths"]
    ports = {port.get("name"): port["containerPort"] for port in container["ports"]}
    assert list(ports.values()) == [PORT]
    asked = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    for probe in asked.values():
        assert probe["path"] in routes
        assert probe["path"] in HEALTH_ROUTES
        assert ports.get(probe["port"], probe["port"]) == PORT
    assert asked["startupProbe"]["path"] == asked["readinessProbe"]["path"] != asked["livenessProbe"]["path"]


@pytest.mark.parametrize("container", CONTAINERS, ids=["deployment", "kserve"])
def test_it_runs_read_only_and_not_as_root_within_limits(container: dict[str, Any]):
    held = container["securityContext"]
    assert held["readOnlyRootFilesystem"] is True
    assert held["allowPrivilegeEscalation"] is False
    assert held["capabilities"] == {"drop": ["ALL"]}
    user = held if "runAsUser" in held else POD["spec"]["securityContext"]
    assert user["runAsNonRoot"] is True
    assert user["seccompProfile"] == {"type": "RuntimeDefault"}
    text = (ROOT / "docker" / "service-cpu.Dockerfile").read_text(encoding="utf-8")
    assert f"USER {user['runAsUser']}:{user['runAsGroup']}\n" in text
    assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp"]


@pytest.mark.parametrize("container", CONTAINERS, ids=["deployment", "kserve"])
def test_its_variables_are_settings(container: dict[str, Any]):
    for variable in container["env"]:
        assert variable["name"].removeprefix("LIMNER_").lower() in Settings.model_fields


def test_the_objects_name_each_other():
    service, scaler, budget = (BY_KIND[kind]["spec"] for kind in ("Service", "HorizontalPodAutoscaler",
                                                                  "PodDisruptionBudget"))  # fmt: skip
    labels = POD["metadata"]["labels"]
    deployment = BY_KIND["Deployment"]
    assert service["selector"] == labels
    assert budget["selector"]["matchLabels"] == labels == deployment["spec"]["selector"]["matchLabels"]
    assert BY_KIND["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert service["ports"][0]["targetPort"] == "http"
    assert POD["metadata"]["annotations"]["prometheus.io/port"] == str(PORT)
    listed = documents("kustomization.yaml")[0]["resources"]
    assert {*listed, *NO_OBJECTS, "kserve.yaml"} == {path.name for path in DIRECTORY.glob("*.yaml")}
    # A service of this name would otherwise set LIMNER_PORT to an address.
    assert POD["spec"]["enableServiceLinks"] is False


def test_the_autoscaler_reads_a_metric_that_the_service_has():
    from service.metrics import Metrics

    (metric,) = BY_KIND["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in {described.name for described in Metrics().described}
    (rule,) = documents("prometheus-adapter.yaml")[0]["rules"]["custom"]
    assert rule["name"]["matches"] == name
    assert rule["seriesQuery"].startswith(f"{name}{{")


def test_there_is_time_to_drain():
    spec = POD["spec"]
    (drain,) = [float(each["value"]) for each in CONTAINERS[0]["env"] if each["name"] == "LIMNER_DRAIN_SECONDS"]
    (pause,) = re.findall(r"sleep\((\d+)\)", CONTAINERS[0]["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert spec["terminationGracePeriodSeconds"] > drain + int(pause)


def test_kserve_speaks_v2():
    model = BY_KIND["InferenceService"]["spec"]["predictor"]["model"]
    assert model["protocolVersion"] in RUNTIME["protocolVersions"] == ["v2"]
    assert model["runtime"] == BY_KIND["ServingRuntime"]["metadata"]["name"]
    assert model["modelFormat"]["name"] in {each["name"] for each in RUNTIME["supportedModelFormats"]}
