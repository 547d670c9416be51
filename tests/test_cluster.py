"""Every file in `cluster/`: manifests against the schemas of what reads them with unknown keys refused, scripts and Dockerfiles linted, and
what the files say of each other. `make cluster-check` runs this file alone."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster_schemas as schemas
import promql_parser
import pytest
import ray
import yaml

from orchestration import config as configuration
from orchestration.runtime import operator_metrics
from orchestration.serving.keys import is_loopback

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "cluster"
TOOLS = Path(sys.executable).parent
LAUNCHERS = sorted((CLUSTER / "launcher").glob("*.yaml"))
MANIFESTS = [*sorted((CLUSTER / "kuberay").glob("*.yaml")), CLUSTER / "monitoring" / "pod_monitor.yaml"]
OBJECTS = [(file, number) for file in MANIFESTS for number in range(len(schemas.documents(file)))]
MONITORING = {
    "monitoring/prometheus.yml": schemas.PROMETHEUS,
    "monitoring/alerts.yml": schemas.RULES,
    "monitoring/grafana/provisioning/datasources/prometheus.yaml": schemas.DATASOURCES,
    "monitoring/grafana/provisioning/dashboards/chatray.yaml": schemas.PROVIDERS,
}
SCRIPTS = sorted([*CLUSTER.rglob("*.sh"), *CLUSTER.rglob("*.sbatch"), ROOT / ".ci" / "run"])
DOCKERFILES = sorted(CLUSTER.glob("Dockerfile*"))
DASHBOARD = CLUSTER / "monitoring" / "grafana" / "dashboards" / "chatray.json"


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def objects(kind: str) -> list[dict[str, Any]]:
    found = [document for file in MANIFESTS for document in schemas.documents(file) if document["kind"] == kind]
    assert found, kind
    return found


def ray_cluster_specs() -> dict[str, dict[str, Any]]:
    """The specs of Ray clusters, by the kind of object that they stand in."""
    (cluster,), (job,), (service,) = objects("RayCluster"), objects("RayJob"), objects("RayService")
    return {"RayCluster": cluster["spec"], "RayJob": job["spec"]["rayClusterSpec"], "RayService": service["spec"]["rayClusterConfig"]}


def groups_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def in_bytes(quantity: str) -> int:
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    number, unit = re.fullmatch(r"(\d+)([KMGT]i)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * units[unit]


# what the schemas say


@pytest.mark.parametrize(("file", "number"), OBJECTS, ids=lambda given: given.name if isinstance(given, Path) else str(given))
def test_every_object_for_kubernetes_is_what_its_schema_says(file: Path, number: int) -> None:
    assert schemas.kubernetes_mistakes(schemas.documents(file)[number]) == []


@pytest.mark.parametrize("file", LAUNCHERS, ids=lambda file: file.name)
def test_launcher_files_are_what_ray_up_takes(file: Path) -> None:
    (content,) = schemas.documents(file)
    assert schemas.launcher_mistakes(content) == []


@pytest.mark.parametrize("name", MONITORING)
def test_files_of_prometheus_and_grafana(name: str) -> None:
    (content,) = schemas.documents(CLUSTER / name)
    assert schemas.found_by(MONITORING[name], content) == []


def test_the_serve_configuration_has_no_unknown_key() -> None:
    (service,) = objects("RayService")
    assert schemas.serve_mistakes(service["spec"]["serveConfigV2"]) == []


def test_no_yaml_file_is_left_out() -> None:
    looked_at = {*MANIFESTS, *LAUNCHERS, *(CLUSTER / name for name in MONITORING)}
    assert {file for pattern in ("*.yaml", "*.yml") for file in CLUSTER.rglob(pattern)} == looked_at


# planted mistakes are found


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the mappings of a document are."""
    if isinstance(value, dict):
        yield at
        for key, inner in value.items():
            yield from paths(inner, (*at, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from paths(inner, (*at, number))


FREE = {"labels", "annotations", "matchLabels", "nodeSelector", "rayStartParams", "requests", "limits", "resources", "external_labels"}
"""Mappings whose keys are anybody's."""


def with_a_typo(document: Any, path: tuple[Any, ...]) -> Any:
    changed = copy.deepcopy(document)
    inner = changed
    for key in path:
        inner = inner[key]
    inner["replcas"] = 1
    return changed


@pytest.mark.parametrize(("file", "number"), OBJECTS, ids=lambda given: given.name if isinstance(given, Path) else str(given))
def test_an_unknown_key_is_found_at_every_depth(file: Path, number: int) -> None:
    document = schemas.documents(file)[number]
    places = [path for path in paths(document) if not (path and path[-1] in FREE) or "containers" in path[-2:-1]]
    assert [path for path in places if not schemas.kubernetes_mistakes(with_a_typo(document, path))] == []
    assert {(), ("metadata",), ("spec",)} <= set(places)


def test_other_mistakes_of_manifests_are_found() -> None:
    (cluster,) = objects("RayCluster")
    worker = ("spec", "workerGroupSpecs", 0)

    def changed(path: tuple[Any, ...], value: Any) -> list[str]:
        broken = copy.deepcopy(cluster)
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return schemas.kubernetes_mistakes(broken)

    assert changed(("apiVersion",), "ray.io/v1alpha1")
    assert changed(("kind",), "RayClusters")
    assert changed((*worker, "maxReplicas"), "eight")
    assert changed((*worker, "groupName"), None)
    assert changed(("spec", "autoscalerOptions", "version"), "v3")
    assert changed(("spec", "authOptions", "mode"), "tokens")
    assert changed((*worker, "template", "spec", "containers", 0, "ports", 0, "containerPort"), "http")
    assert changed((*worker, "template", "spec", "volumes", 1, "emptyDir", "sizeLimit"), [1])
    assert changed((*worker, "template", "metadata", "labels", "gpus"), 8)
    assert changed((*worker, "maxReplicas"), 4) == []


@pytest.mark.parametrize("file", LAUNCHERS, ids=lambda file: file.name)
def test_a_typo_in_a_launcher_file_is_found(file: Path) -> None:
    (content,) = schemas.documents(file)
    open_places = ("resources", "labels", "file_mounts")
    for path in paths(content):
        if path and (path[-1] in (*open_places, "available_node_types") or ("node_config" in path and path[-1] != "node_config")):
            continue
        assert schemas.launcher_mistakes(with_a_typo(content, path)), path


@pytest.mark.parametrize(
    "text",
    [
        "applications: [{name: a, import_path: 'a:b', route_prefx: /}]",
        "applications: [{name: a, import_path: 'a:b', deployments: [{name: d, num_replica: 1}]}]",
        "applications: [{name: a, import_path: 'a:b', deployments: [{name: d, autoscaling_config: {max_replica: 1}}]}]",
        "applications: [{name: a, import_path: 'a:b', deployments: [{name: d, ray_actor_options: {num_gpu: 1}}]}]",
        "{applications: [], http_option: {port: 1}}",
        "{applications: [], http_options: {prt: 1}}",
        "{applications: [{name: a}]}",
    ],
)
def test_a_typo_in_a_serve_configuration_is_found(text: str) -> None:
    assert schemas.serve_mistakes(text)


@pytest.mark.parametrize("name", MONITORING)
def test_a_typo_for_prometheus_or_grafana_is_found(name: str) -> None:
    (content,) = schemas.documents(CLUSTER / name)
    for path in paths(content):
        if not (path and path[-1] in ("labels", "annotations")):
            assert schemas.found_by(MONITORING[name], with_a_typo(content, path)), path


def test_a_key_that_stands_twice_is_found(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("a: {b: 1, c: 2, b: 3}\n")
    with pytest.raises(yaml.YAMLError, match="b stands twice"):
        schemas.documents(tmp_path / "twice.yaml")


# what the files promise


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_clusters_keep_the_token_the_head_and_the_memory(kind: str) -> None:
    spec = ray_cluster_specs()[kind]
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"]["mode"] == "token"
    assert spec["gcsFaultToleranceOptions"]["redisAddress"].split(":")[0] in {found["metadata"]["name"] for found in objects("Service")}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    grows = bool(spec.get("enableInTreeAutoscaling"))
    tokens = [group["template"]["spec"]["automountServiceAccountToken"] for group in groups_of(spec)]
    assert tokens == [grows, *[False] * len(spec["workerGroupSpecs"])]  # Kubernetes' own: the autoscaler alone talks to it
    for group in groups_of(spec):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        shm = mounts["/dev/shm"]["emptyDir"]
        assert shm["medium"] == "Memory"
        assert int(group["rayStartParams"]["object-store-memory"]) < in_bytes(shm["sizeLimit"])
        assert in_bytes(shm["sizeLimit"]) < in_bytes(container["resources"]["limits"]["memory"])
        assert mounts["/runs"]["persistentVolumeClaim"]["claimName"] in {o["metadata"]["name"] for o in objects("PersistentVolumeClaim")}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert "preStop" in container["lifecycle"]
        assert pod["terminationGracePeriodSeconds"] > 60
        assert pod.get("restartPolicy", "Never") == "Never"  # the autoscaler's second version asks for it
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert group["template"]["metadata"]["labels"]["app.kubernetes.io/part-of"] == "chatray"
    for group in spec["workerGroupSpecs"]:
        gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        assert group["labels"]["gpus"] == gpus


def test_clusters_that_grow_do_it_by_the_second_autoscaler() -> None:
    specs = ray_cluster_specs()
    assert {kind for kind, spec in specs.items() if spec.get("enableInTreeAutoscaling")} == {"RayCluster", "RayService"}
    assert all(spec["autoscalerOptions"]["version"] == "v2" for spec in specs.values() if spec.get("enableInTreeAutoscaling"))
    assert all(group["minReplicas"] == group["maxReplicas"] for group in specs["RayJob"]["workerGroupSpecs"])


def test_ports_of_a_cluster_are_open_to_itself_alone() -> None:
    policies = {found["metadata"]["name"]: found["spec"] for found in objects("NetworkPolicy")}
    ours = {"podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "chatray"}}}
    for policy in policies.values():
        for rule in policy["ingress"]:
            assert rule["from"], "a rule without `from` lets everybody in"
            assert "ports" in rule or rule["from"] == [ours]
    outside = {port["port"] for rule in policies["chatray-serve"]["ingress"] for port in rule["ports"]}
    assert outside == {8000}
    (redis,) = policies["chatray-redis"]["ingress"]
    assert redis["from"][0]["podSelector"]["matchExpressions"][0]["values"] == ["head", "redis-cleanup"]
    operator, monitoring = policies["chatray-inside"]["ingress"][1:]
    assert {port["port"] for port in monitoring["ports"]} & {6379, 10001, 8265} == set()
    assert operator["from"][0]["podSelector"], "the operator, and not its whole namespace"
    heads = [spec["headGroupSpec"]["template"]["spec"]["containers"][0] for spec in ray_cluster_specs().values()]
    ports = {port["name"] for head in heads for port in head["ports"]}
    (monitor,) = objects("PodMonitor")
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports


def test_the_job_is_a_run_that_composes_and_fits(tmp_path: Path) -> None:
    from orchestration.planner.choices import settled
    from orchestration.planner.plan import plan

    (job,) = objects("RayJob")
    program, verb, *words = shlex.split(job["spec"]["entrypoint"])
    assert (program, verb) == ("chatray", "run")
    assert "ray.address=auto" in words
    for folder in ("data/demonstrations", "data/comparisons", "data/texts", "model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.jsonl").touch()
    (tmp_path / "model" / "config.json").write_text("{}")
    stand_ins = {"data.path": tmp_path / "data", "model.path": tmp_path / "model", "run_dir": tmp_path / "run"}
    given = [f"{key}={stand_ins.get(key, value)}" for key, _, value in (word.partition("=") for word in words)]
    config = configuration.load(given, tmp_path)
    assert config.scale.name == "13b"
    comment = (CLUSTER / "kuberay" / "ray_job.yaml").read_text(encoding="utf-8")
    (planned,) = re.findall(r"`chatray plan ([^`]*)`", comment)
    of_both = ("experiment", "scale", "placement", "engine.rollout_batch")
    assert {word for word in words if word.split("=")[0] in of_both} <= set(planned.split())
    found, nodes, _ = settled(planned.split(), lambda *_: [])
    assert plan(found, nodes).fits
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    resources = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(resources["nvidia.com/gpu"]) * group["replicas"] == config.placement.devices
    assert int(resources["cpu"]) >= sum(getattr(config.placement, role).cpus for role in config.roles_of_ppo()) * config.placement.devices


def test_the_service_starts_what_there_is(tmp_path: Path) -> None:
    """The builder that the manifest names, with words that `chatray serve` understands, API keys, and the GPU that its pods have."""
    (service,) = objects("RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, _, builder = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), builder))
    checkpoint, *words = application["args"]["words"]
    assert checkpoint.startswith("checkpoint=/runs/")
    serving = configuration.load(words, tmp_path, reads_data=False, consistent=False).serving
    assert serving.keys and not is_loopback(serving.host)
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert serving.engines.gpus == int(limits["nvidia.com/gpu"])
    assert serving.engines.most == group["maxReplicas"]


# scripts and images


@pytest.mark.parametrize("file", SCRIPTS, ids=name_of)
def test_scripts_pass_shellcheck(file: Path) -> None:
    done = subprocess.run([TOOLS / "shellcheck", "--shell=bash", file], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=name_of)
def test_dockerfiles_pass_hadolint_and_run_as_nobody_special(file: Path) -> None:
    done = subprocess.run([TOOLS / "hadolint", file], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    lines = file.read_text(encoding="utf-8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1].startswith("1000")
    copies = [line.split()[1] for line in lines if line.startswith("COPY ")]
    assert copies[0] == "constraints.txt"
    assert copies[-3:] == ["conf", "actors", "orchestration"], "code comes last: it changes most"


def test_linters_find_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm -rf $1/*\n")
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN cd /x && pip install y\n")
    shell = subprocess.run([TOOLS / "shellcheck", tmp_path / "bad.sh"], capture_output=True, text=True, timeout=60, check=False)
    image = subprocess.run([TOOLS / "hadolint", tmp_path / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert "SC2086" in shell.stdout
    assert "DL3007" in image.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=name_of)
def test_what_an_image_copies_is_let_into_its_context(file: Path) -> None:
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")]
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert source in let_in
                assert (ROOT / source).exists()


# monitoring


def queries() -> list[tuple[str, str]]:
    """(panel, expression), with the dashboard's variables filled in."""
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"]]
    found += [(rule["alert"], rule["expr"]) for group in alerts()["groups"] for rule in group["rules"]]
    return [(title, expression.replace("$run", ".*").replace("$stage", ".*")) for title, expression in found]


def alerts() -> dict[str, Any]:
    return schemas.documents(CLUSTER / "monitoring" / "alerts.yml")[0]


def exported() -> set[str]:
    """Names of chatray's figures as Prometheus sees them."""
    single = [name for name, _ in operator_metrics.GAUGES.values()]
    single += [operator_metrics.TOKENS[0], operator_metrics.WAITED[0], operator_metrics.CALL_SECONDS[0], operator_metrics.CALLS[0]]
    return {f"ray_{name}" for name in single} | {f"ray_{operator_metrics.PHASES[0]}_{part}" for part in ("bucket", "count", "sum")}


@pytest.mark.parametrize(("title", "expression"), queries())
def test_every_query_parses_and_asks_for_figures_that_are_exported(title: str, expression: str) -> None:
    promql_parser.parse(expression)
    names = set(re.findall(r"\bray_[a-z_]+", re.sub(r"\{[^}]*\}|by \([^)]*\)", "", expression)))
    assert names, title
    assert {name for name in names if name.startswith("ray_chatray_")} - exported() == set()
    source = "".join(file.read_text() for file in (Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards").glob("*.py"))
    assert [name for name in names if not name.startswith("ray_chatray_") and name not in source] == []


def test_the_dashboard_shows_all_that_is_exported() -> None:
    asked = " ".join(expression for _, expression in queries())
    unseen = {name for name in exported() if name not in asked} - {f"ray_{operator_metrics.CALLS[0]}"}
    assert unseen - {f"ray_{operator_metrics.PHASES[0]}_{part}" for part in ("count", "sum")} == set()


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert all(p["x"] + p["w"] <= 24 for p in places)


def test_promtool_agrees_where_it_is_installed() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: the files were held against our own schemas alone")
    file = CLUSTER / "monitoring" / "prometheus.yml"
    done = subprocess.run([promtool, "check", "config", file], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_names_every_file() -> None:
    text = (CLUSTER / "README.md").read_text(encoding="utf-8")
    files = [Path(folder) / name for folder, _, names in os.walk(CLUSTER) for name in names]
    assert [name_of(file) for file in files if f"`{file.relative_to(CLUSTER).as_posix()}`" not in text and file.name != "README.md"] == []
