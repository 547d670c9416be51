"""Take CRD schemas over from a checkout of the project that publishes them.

    python tests/schemas/vendor.py <git directory> <tag> <folder in it> <folder here> <file> ...

What a validator does not read is left out (descriptions, and versions other than v1); the rest is as published, as compressed JSON. Prints
the lines of the table in README.md.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


def without_descriptions(schema: Any, names: bool = False) -> Any:
    """Args:
    names: this is a table of properties, where `description` would be a field's name.
    """
    if isinstance(schema, list):
        return [without_descriptions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: without_descriptions(v, k == "properties" and not names) for k, v in schema.items() if names or k != "description"}


def main(git: str, tag: str, source: str, target: str, *files: str) -> None:
    here = Path(__file__).parent / target
    for file in files:
        content = subprocess.run(["git", "-C", git, "show", f"{tag}:{source}/{file}"], capture_output=True, check=True).stdout
        spec = yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        (version,) = [version for version in spec["versions"] if version["name"] == "v1"]
        kept = {"group": spec["group"], "kind": spec["names"]["kind"], "version": "v1"}
        kept["schema"] = without_descriptions(version["schema"]["openAPIV3Schema"])
        packed = gzip.compress(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode(), 9, mtime=0)
        (here / f"{kept['kind']}.json.gz").write_bytes(packed)
        print(f"| `{target}/{kept['kind']}.json.gz` | `{source}/{file}` | `{hashlib.sha256(content).hexdigest()}` |")


if __name__ == "__main__":
    main(*sys.argv[1:])
