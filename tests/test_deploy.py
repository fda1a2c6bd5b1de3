"""What the recipes in deploy/ say is what the program understands."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harmonium import ray
from harmonium.options import parse
from harmonium.server.health import router

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
VERSIONS = {
    "PersistentVolumeClaim": "v1",
    "Service": "v1",
    "Secret": "v1",
    "Deployment": "apps/v1",
    "PodDisruptionBudget": "policy/v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "RayService": "ray.io/v1",
}


def documents() -> list[dict[str, Any]]:
    paths = sorted(DEPLOY.rglob("*.yaml"))
    return [found for path in paths for found in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def of_kind(kind: str) -> list[dict[str, Any]]:
    found = [document for document in documents() if document["kind"] == kind]
    assert found, f"no {kind} in deploy/"
    return found


def pods() -> Iterator[dict[str, Any]]:
    for deployment in of_kind("Deployment"):
        yield deployment["spec"]["template"]["spec"]
    for service in of_kind("RayService"):
        cluster = service["spec"]["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield group["template"]["spec"]


def containers() -> list[dict[str, Any]]:
    return [container for pod in pods() for container in pod["containers"]]


def unit() -> list[tuple[str, str]]:
    text = (DEPLOY / "systemd/harmonium.service").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and line[0] not in "#["]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


def unit_value(name: str) -> str:
    (value,) = [value for found, value in unit() if found == name]
    return value


def commands() -> list[list[str]]:
    """The words behind `harmonium` in the unit, the image, the pods and the pages of deploy/."""
    found = [shlex.split(unit_value("ExecStart"))[1:]]
    image = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    found += [yaml.safe_load(line[4:]) for line in image.splitlines() if line.startswith("CMD [")]
    found += [container["args"] for container in containers() if "args" in container]
    for page in DEPLOY.rglob("*.md"):
        lines = page.read_text(encoding="utf-8").splitlines()
        found += [shlex.split(line)[1:] for line in lines if line.startswith("harmonium ")]
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_of_a_recipe_parses(words: list[str]) -> None:
    assert parse(words).command == "serve"


def test_every_place_of_commands_is_looked_at() -> None:
    assert len(commands()) >= 4


def test_every_document_has_the_version_of_its_kind() -> None:
    assert {found["kind"]: found["apiVersion"] for found in documents()} == VERSIONS


def test_selectors_choose_the_pods_of_a_deployment() -> None:
    labels = [found["spec"]["template"]["metadata"]["labels"] for found in of_kind("Deployment")]
    chosen = [found["spec"]["selector"]["matchLabels"] for found in of_kind("Deployment")]
    assert chosen == labels
    assert all(found["spec"]["selector"] in labels for found in of_kind("Service"))
    assert all(found["spec"]["selector"]["matchLabels"] in labels for found in of_kind("PodDisruptionBudget"))


def test_autoscaler_names_a_deployment_that_sets_no_replicas() -> None:
    deployments = {found["metadata"]["name"]: found["spec"] for found in of_kind("Deployment")}
    for scaler in of_kind("HorizontalPodAutoscaler"):
        assert "replicas" not in deployments[scaler["spec"]["scaleTargetRef"]["name"]]


def test_ports_agree_between_program_container_probes_and_service() -> None:
    for found in of_kind("Deployment"):
        (container,) = found["spec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert parse(container["args"]).port in ports.values()
        for probe in ("readinessProbe", "livenessProbe"):
            assert ports[container[probe]["httpGet"]["port"]] == parse(container["args"]).port
        services = [s for s in of_kind("Service") if s["metadata"]["name"] == found["metadata"]["name"]]
        assert [port["targetPort"] in ports for s in services for port in s["spec"]["ports"]] == [True]


def test_image_exposes_and_looks_at_the_port_that_it_serves() -> None:
    image = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    (command,) = [yaml.safe_load(line[4:]) for line in image.splitlines() if line.startswith("CMD [")]
    port = parse(command).port
    assert re.findall(r"^EXPOSE (\d+)$", image, re.MULTILINE) == [str(port)]
    assert re.findall(r"127\.0\.0\.1:(\d+)(/\w+)", image) == [(str(port), "/health")]


def test_probes_ask_for_routes_that_we_have() -> None:
    routes = {getattr(route, "path", None) for route in router.routes}
    for container in containers():
        if "args" in container:
            assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
            assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert {"/ready", "/health"} <= routes


def test_environment_variables_are_ones_that_the_program_reads() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "harmonium").rglob("*.py"))
    files = [path for path in DEPLOY.rglob("*") if path.is_file()]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    names = set(re.findall(r"\b(?:HARMONIUM_[A-Z_]+|HF_[A-Z_]+|XDG_[A-Z_]+)\b", text))
    assert {"HARMONIUM_API_KEY", "HARMONIUM_STORE_URL", "HF_HOME", "XDG_CACHE_HOME"} <= names
    assert [name for name in sorted(names) if f'"{name}"' not in source] == []


def test_secrets_that_are_named_are_in_the_example() -> None:
    secrets = {found["metadata"]["name"]: found["stringData"] for found in of_kind("Secret")}
    wanted = [entry["valueFrom"]["secretKeyRef"] for c in containers() for entry in c.get("env", [])]
    assert wanted
    assert [ref for ref in wanted if ref["key"] not in secrets[ref["name"]]] == []


def test_volumes_that_are_mounted_are_there() -> None:
    claims = {found["metadata"]["name"] for found in of_kind("PersistentVolumeClaim")}
    for pod in pods():
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= set(volumes)
        sources = [volume.get("persistentVolumeClaim") for volume in volumes.values()]
        named = {source["claimName"] for source in sources if source}
        assert named <= claims


def test_who_stops_the_server_waits_longer_than_it_drains() -> None:
    assert int(unit_value("TimeoutStopSec")) > parse(shlex.split(unit_value("ExecStart"))[1:]).drain_timeout
    for found in of_kind("Deployment"):
        pod = found["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        hook = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        (pause,) = re.findall(r"sleep\((\d+)\)", hook)
        drain = parse(container["args"]).drain_timeout
        assert pod["terminationGracePeriodSeconds"] >= drain + int(pause) + 20


def serve_applications() -> list[dict[str, Any]]:
    return [
        application
        for found in of_kind("RayService")
        for application in yaml.safe_load(found["spec"]["serveConfigV2"])["applications"]
    ]


def test_ray_application_gives_the_builder_arguments_that_it_takes() -> None:
    known = {"model", "replicas", "store_url", "threads", "context_length", "max_sequences"}
    assert all(set(application["args"]) <= known for application in serve_applications())


def test_ray_worker_has_room_for_the_threads_of_a_replica() -> None:
    (threads,) = [application["args"]["threads"] for application in serve_applications()]
    for found in of_kind("RayService"):
        for group in found["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
            (worker,) = group["template"]["spec"]["containers"]
            assert int(worker["resources"]["limits"]["cpu"]) >= threads


def test_ray_import_path_is_a_builder_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for application in serve_applications():
        module, _, name = application["import_path"].partition(":")
        assert getattr(importlib.import_module(module), name) is ray.app
        monkeypatch.setenv("HARMONIUM_STORE_URL", "postgresql://harmonium@postgres/harmonium")
        ray._settings(ray.parse(application["args"]))  # raises for an option that there is not
