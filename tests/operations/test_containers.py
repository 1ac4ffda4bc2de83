"""docker-compose.yml, the Dockerfiles and what docs/containers.md says of them."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings, load_settings

yaml = pytest.importorskip("yaml", reason='pip install -e ".[dev]"')

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PAGE = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")

# Fixed by the image, or a path that would have to be a file inside the container.
NOT_PASSED = {"host", "port", "bundles", "admin_key_file", "api_keys_file"}
SERVERS = ("limner", "limner-gpu")


def test_up_alone_starts_the_cpu_service_and_nothing_else():
    assert [name for name, service in SERVICES.items() if not service.get("profiles")] == ["limner"]
    profiles = {profile for service in SERVICES.values() for profile in service.get("profiles", [])}
    assert profiles == {"gpu", "monitoring", "train"}
    assert all(f"--profile {profile}" in PAGE or f"`{profile}`" in PAGE for profile in profiles)


def test_only_what_a_person_opens_is_open_and_only_on_this_machine():
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports.keys() == {"limner", "limner-gpu", "grafana"}
    opened = [re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-(\d+)\}:\d+", port) for each in ports.values() for port in each]
    assert all(opened)
    assert len({found[1] for found in opened if found}) == 3, "two of them could not run side by side"
    assert not any("network_mode" in service and service["network_mode"] != "none" for service in SERVICES.values())


@pytest.mark.parametrize("name", SERVICES)
def test_each_is_held(name: str):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > 0
    assert service["mem_limit"]
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    once = {"plans", "train", "train-gpu"}
    assert service["restart"] == ("no" if name in once else "unless-stopped")
    assert "privileged" not in service
    if "build" not in service:
        assert re.search(r":v?\d+\.\d+\.\d+", service["image"]), "pin it"


@pytest.mark.parametrize("name", SERVICES)
def test_what_it_mounts_and_builds_is_there(name: str):
    service = SERVICES[name]
    volumes = yaml.safe_load(TEXT)["volumes"]
    for mounted in service.get("volumes", []):
        source = mounted.split(":")[0]
        if not source.startswith("./"):
            assert source in volumes
        elif source != "./data":  # the user's own pictures
            assert (ROOT / source).exists()
            assert mounted.endswith(":ro")
    if "build" in service:
        assert (ROOT / service["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("name", SERVERS)
def test_every_setting_can_be_given_from_outside(name: str):
    passed = {key for key, value in SERVICES[name]["environment"].items() if value is None}
    fields = {f"LIMNER_{field.upper()}" for field in Settings.model_fields if field not in NOT_PASSED}
    assert passed - {"LIMNER_BUNDLES"} == fields


def test_the_gpu_service_serves_what_the_tools_built():
    plans, service = SERVICES["plans"], SERVICES["limner-gpu"]
    assert service["depends_on"] == {"plans": {"condition": "service_completed_successfully"}}
    assert "plans:/plans" in plans["volumes"]
    assert "plans:/plans:ro" in service["volumes"]
    assert service["environment"]["LIMNER_BUNDLES"] == "/plans"
    (script,) = plans["command"]
    assert "limner export trt" in script
    for name in ("plans", "limner-gpu", "train-gpu", "dcgm-exporter"):
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
    assert not any("deploy" in SERVICES[name] for name in ("limner", "train", "prometheus", "grafana"))


def test_plans_are_built_once(tmp_path: Path):
    """The script of the service, with a command in place of limner that says how it was called."""
    (tmp_path / "limner").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "limner").chmod(0o755)
    (script,) = SERVICES["plans"]["command"]
    script = script.replace("$$", "$").replace("/plans", str(tmp_path / "plans"))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BUNDLE": "person/1"}

    def told() -> str:
        done = subprocess.run(["sh", "-ec", script], env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert told() == f"export trt /bundles/person/1 --out {tmp_path}/plans/person/1\n"
    (tmp_path / "plans/person/1").mkdir(parents=True)
    (tmp_path / "plans/person/1/manifest.json").touch()
    assert "are there" in told()


@pytest.mark.parametrize("profiles", [(), ("gpu", "monitoring", "train")], ids=["plain", "all"])
def test_docker_compose_accepts_it(program, profiles: tuple[str, ...]):
    flags = [flag for profile in profiles for flag in ("--profile", profile)]
    command = [program("docker-compose"), *flags, "config"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LIMNER_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "127.0.0.1" in done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images(path: Path):
    text = path.read_text(encoding="utf-8")
    base = re.search(r"^ARG BASE_IMAGE=\S+:(\S+)$", text, re.MULTILINE)
    assert base
    assert re.match(r"\d+\.\d+\.\d+", base[1]), "pinned"
    assert text.count("\nFROM ") >= 2, "built in one stage, shipped in another"
    assert "\nUSER 65532:65532\n" in text
    for label in ("title", "description", "licenses", "version", "revision", "base.name"):
        assert f"org.opencontainers.image.{label}=" in text
    # A secret is never a layer: neither copied nor an argument.
    assert not re.search(r"^(ARG|ENV) .*(INDEX|TOKEN|PASSWORD)", text, re.MULTILINE)
    for variable, value in re.findall(r"(LIMNER_\w+)=(\S+)", text):
        assert load_settings(**{variable.removeprefix("LIMNER_").lower(): value})


def test_what_the_images_copy_is_not_ignored():
    ignored = set((ROOT / ".dockerignore").read_text(encoding="utf-8").split())
    for path in DOCKERFILES:
        for line in re.findall(r"^COPY (?!--from)(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            for source in line.split()[:-1]:
                assert (ROOT / source).exists()
                assert source not in ignored


def test_the_check_reads_as_a_script_and_says_what_it_takes():
    script = str(ROOT / "docker" / "check.sh")
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    told = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--pip-conf" in told
    assert "BASE_IMAGE" in told
    wrong = subprocess.run([script, "--nonsense"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "--help" in wrong.stderr
