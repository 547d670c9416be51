"""What a manifest under `cluster/` is held against. Each check gives its findings as texts; an unknown key is always one.

| what | schema |
|---|---|
| RayCluster, RayJob, RayService, PodMonitor | the CRDs of pinned releases (`tests/schemas`) |
| Kubernetes' own objects | the strict schemas in the package kubernetes-validate |
| files of `ray up` | Ray's own, in its wheel; node types get what Ray's leaves open from the provider's fields below |
| the Serve configuration in a RayService | Ray's pydantic models, closed here: Ray's accept unknown keys |
| files of Prometheus and Grafana's provisioning | the part of their formats that is used here, as JSON schemas |
"""

from __future__ import annotations

import copy
import functools
import gzip
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import ray
import yaml
from pydantic import BaseModel

SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.33"
"""The oldest version of Kubernetes that the manifests are checked against."""
METADATA = {"name", "namespace", "labels", "annotations"}
"""What our manifests say of an object; a CRD leaves its metadata to Kubernetes."""
KEEPS_UNKNOWN = "x-kubernetes-preserve-unknown-fields"


class OneOfEach(yaml.SafeLoader):
    """A key that stands twice in one mapping is an error; YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"{node.start_mark}: {', '.join(map(str, twice))} stands twice")
        return super().construct_mapping(node, deep)


def documents(file: Path) -> list[Any]:
    """The documents of a YAML file."""
    return [found for found in yaml.load_all(file.read_text(encoding="utf-8"), Loader=OneOfEach) if found is not None]


def found_by(schema: Any, content: Any) -> list[str]:
    """The findings of a JSON schema."""
    found = jsonschema.Draft202012Validator(schema).iter_errors(content)
    return [f"{'.'.join(map(str, error.absolute_path)) or 'top'}: {error.message[:300]}" for error in found]


def kubernetes_mistakes(document: dict[str, Any]) -> list[str]:
    """Of any object for Kubernetes."""
    group, kind = str(document.get("apiVersion", "")).partition("/")[0], document.get("kind")
    if crd := crds().get((group, str(kind))):
        unknown = [f"metadata: {key} is unknown" for key in document.get("metadata", {}).keys() - METADATA]
        return [*found_by(crd, document), *unknown]
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return []
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message[:300]}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"{document.get('apiVersion')} {kind}: no such kind of object"]


@functools.cache
def crds() -> dict[tuple[str, str], Any]:
    """(group, kind) -> JSON schema of the object."""
    found = {}
    for file in SCHEMAS.glob("*/*.json.gz"):
        crd = json.loads(gzip.decompress(file.read_bytes()))
        schema = closed(crd["schema"])
        schema["properties"] |= {
            "apiVersion": {"const": f"{crd['group']}/{crd['version']}"}, "kind": {"const": crd["kind"]}, "metadata": {"type": "object"},
        }  # fmt: skip
        schema["properties"].pop("status", None)
        schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
        found[crd["group"], crd["kind"]] = schema
    return found


def closed(schema: Any) -> Any:
    """A structural schema of Kubernetes as a JSON schema that refuses what the API server would drop or refuse."""
    schema = copy.copy(schema)
    if schema.pop("x-kubernetes-int-or-string", False):
        return {"anyOf": [{"type": "integer"}, {"type": "string", **{k: schema[k] for k in ("pattern",) if k in schema}}]}
    if "properties" in schema:
        schema["properties"] = {name: closed(part) for name, part in schema["properties"].items()}
    if isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = closed(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get(KEEPS_UNKNOWN):
        schema["additionalProperties"] = False
    if "items" in schema:
        schema["items"] = closed(schema["items"])
    if schema.pop("nullable", False):
        schema = {"anyOf": [schema, {"type": "null"}]}
    return schema


def serve_mistakes(text: str) -> list[str]:
    """Of a Serve configuration (`serveConfigV2`)."""
    from ray.serve.schema import ServeDeploySchema

    content = yaml.load(text, Loader=OneOfEach)
    found = list(unknown_keys(ServeDeploySchema, content))
    try:
        ServeDeploySchema.model_validate(content)
    except ValueError as error:
        found.append(str(error))
    return found


def unknown_keys(model: type[BaseModel], content: Any, at: str = "") -> Iterator[str]:
    """Keys that are no field of the model, at any depth."""
    if not isinstance(content, dict):
        return
    names = {name for field, info in model.model_fields.items() for name in (field, info.alias) if name}
    yield from (f"{at}{key}: unknown" for key in content if key not in names)
    for key, value in content.items():
        for inner in models_in(model.model_fields[key].annotation) if key in model.model_fields else ():
            for number, item in enumerate(value if isinstance(value, list) else [value]):
                yield from unknown_keys(inner, item, f"{at}{key}[{number}]." if isinstance(value, list) else f"{at}{key}.")


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's type holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


AWS_NODE = {"InstanceType", "ImageId", "BlockDeviceMappings", "IamInstanceProfile", "InstanceMarketOptions", "Placement", "SubnetIds",
            "SecurityGroupIds", "NetworkInterfaces", "KeyName", "UserData", "TagSpecifications", "MetadataOptions"}  # fmt: skip
"""Fields of EC2's RunInstances that a node type may give (boto3 `create_instances`)."""
GCP_NODE = {"machineType", "disks", "networkInterfaces", "serviceAccounts", "scheduling", "guestAccelerators", "metadata", "labels", "tags",
            "minCpuPlatform", "shieldedInstanceConfig"}  # fmt: skip
"""Fields of Compute Engine's Instance that a node type may give."""
PROVIDER = {
    "aws": {"type", "region", "availability_zone", "use_internal_ips", "cache_stopped_nodes", "security_group"},
    "gcp": {"type", "region", "availability_zone", "project_id", "use_internal_ips"},
}


def launcher_mistakes(content: dict[str, Any]) -> list[str]:
    """Of a file for `ray up`. Ray's schema leaves the provider and its node configurations open."""
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    found = [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in jsonschema.Draft7Validator(schema).iter_errors(content)]
    kind = content["provider"]["type"]
    found += [f"provider: {key} is unknown" for key in content["provider"].keys() - PROVIDER[kind]]
    for name, node in content["available_node_types"].items():
        fields = node["node_config"].keys() - {"aws": AWS_NODE, "gcp": GCP_NODE}[kind]
        found += [f"{name}: node_config.{field} is unknown" for field in fields]
    return found


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


TEXT, LIST = {"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}
DURATION = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h|d)$"}
RELABEL = _object(
    source_labels=LIST, target_label=TEXT, regex=TEXT, replacement=TEXT, separator=TEXT,
    action={"enum": ["replace", "keep", "drop", "labelmap", "labeldrop", "labelkeep"]},
)  # fmt: skip
PROMETHEUS = _object(
    "global scrape_configs",
    **{"global": _object(scrape_interval=DURATION, evaluation_interval=DURATION, external_labels={"type": "object"})},
    rule_files=LIST,
    scrape_configs={
        "type": "array",
        "items": _object(
            "job_name", job_name=TEXT, scrape_interval=DURATION, metrics_path=TEXT, scheme={"enum": ["http", "https"]},
            file_sd_configs={"type": "array", "items": _object("files", files=LIST, refresh_interval=DURATION)},
            static_configs={"type": "array", "items": _object("targets", targets=LIST, labels={"type": "object"})},
            relabel_configs={"type": "array", "items": RELABEL}, metric_relabel_configs={"type": "array", "items": RELABEL},
        ),
    },
)  # fmt: skip
"""Prometheus' configuration, https://prometheus.io/docs/prometheus/latest/configuration/configuration/."""
RULES = _object(
    "groups",
    groups={"type": "array", "items": _object("name rules", name=TEXT, interval=DURATION, rules={"type": "array", "items": _object(
        "alert expr", alert=TEXT, expr=TEXT, **{"for": DURATION}, labels={"type": "object"}, annotations={"type": "object"},
    )})},
)  # fmt: skip
"""Prometheus' alerting rules."""
DATASOURCES = _object(
    "apiVersion datasources", apiVersion={"const": 1},
    datasources={"type": "array", "items": _object(
        "name type url", name=TEXT, type=TEXT, uid=TEXT, url=TEXT, access={"enum": ["proxy", "direct"]}, isDefault={"type": "boolean"},
        editable={"type": "boolean"}, jsonData={"type": "object"},
    )},
)  # fmt: skip
PROVIDERS = _object(
    "apiVersion providers", apiVersion={"const": 1},
    providers={"type": "array", "items": _object(
        "name options", name=TEXT, folder=TEXT, type={"const": "file"}, disableDeletion={"type": "boolean"},
        allowUiUpdates={"type": "boolean"}, options=_object("path", path=TEXT),
    )},
)  # fmt: skip
"""Grafana's provisioning, https://grafana.com/docs/grafana/latest/administration/provisioning/."""
