#!/usr/bin/env bash
# Set up and run the whole test suite: bash tests/run.sh [pytest arguments]
# LOCKED=1 sets up with the very files that requirements.lock names, and no other; torch, which is not in it, comes first.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${LOCKED:-}" ] && [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(sed -n 's/^\(torch[^ ]*\).*/\1/p' requirements.txt)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
fi
bash quickstart.sh --setup
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
# The browser test wants a browser and a font with Chinese characters; where they cannot be had it says so and is skipped.
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium fonts-noto-cjk) >/dev/null 2>&1 \
        || echo "tests/run.sh: chromium could not be installed; the browser test will be skipped"
fi
# Three test files at a time, for two cores: some only wait. One thread each, or they would wait for each other's.
OMP_NUM_THREADS=1 GOMP_SPINCOUNT=10000 exec .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
