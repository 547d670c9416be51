#!/usr/bin/env bash
# Chromium for the tests of the chat page: from the distribution, since playwright's own builds come from a host that not every machine reaches.
# Without root or apt the tests skip and say so; in CI (CI=true) that is an error.
set -euo pipefail

for name in chromium chromium-browser google-chrome; do
  command -v "$name" >/dev/null && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends chromium >/dev/null; } && exit 0
fi
echo "NO CHROMIUM: the tests of the chat page will be skipped. Install one (Debian: apt-get install chromium)." >&2
[ -z "${CI:-}" ]
