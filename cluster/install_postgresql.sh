#!/usr/bin/env bash
# A PostgreSQL server for the tests of the store (tests/integration/test_store.py start one of their own), where there is none: only as
# root on Debian or Ubuntu. Elsewhere these tests say what is missing, and fail in CI.
set -euo pipefail
if command -v initdb > /dev/null || ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1; then
  exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "no PostgreSQL server: the tests of the store on PostgreSQL will be skipped; install your system's package postgresql" >&2
  exit 0
fi
apt-get update --quiet --quiet || true
DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --quiet --no-install-recommends postgresql > /dev/null \
  || echo "PostgreSQL could not be installed: the tests of the store on PostgreSQL will be skipped" >&2
