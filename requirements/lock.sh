#!/bin/sh
# Re-resolves the locked requirements for Python 3.11 to 3.13; `sh requirements/lock.sh --upgrade` takes newer versions.
set -eu
cd "$(dirname "$0")/.."
compile() { uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header -q "$@"; }
compile --group bootstrap -o requirements/bootstrap.txt
compile pyproject.toml -c requirements/bootstrap.txt -o requirements/runtime.txt "$@"
compile pyproject.toml --group dev -c requirements/runtime.txt -o requirements/dev.txt "$@"
