#!/usr/bin/env bash
# An extension of C that setuptools may leave out (optional = true), installed in place (pip install -e), whose source is
# then changed to something that does not compile, and installed again.
#
# Expected: an extension that cannot be built is left out, as at a first install, and the import fails or a fallback runs.
# Seen (setuptools 84.2.1 with pip 26.3; 77.0.3 does the same): pip exits with 0 and prints "Successfully installed", and the
# library of the earlier source stays beside the package. So new Python calls old C, which with ctypes, where nothing
# compares signatures, is wrong numbers or a crash. The compiler's error shows in pip install -v alone.
set -eu

command -v cc > /dev/null || { echo "needs a C compiler"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/stale"
cat > "$folder/pyproject.toml" <<'EOF_TOML'
[build-system]
requires = ["setuptools==84.2.1"]
build-backend = "setuptools.build_meta"

[project]
name = "stale"
version = "1"

[tool.setuptools]
packages = ["stale"]

[[tool.setuptools.ext-modules]]
name = "stale._library"
sources = ["stale/library.c"]
optional = true
EOF_TOML
cat > "$folder/stale/__init__.py" <<'EOF_PY'
import ctypes
import importlib.util

library = importlib.util.find_spec("stale._library")
print("no library" if library is None else f"the library of source {ctypes.CDLL(library.origin).source()}")
EOF_PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pip==26.3

install() {
  printf '__attribute__((visibility("default"))) %s\n' "$1" > "$folder/stale/library.c"
  "$folder/venv/bin/pip" install --disable-pip-version-check ${2:-} -e "$folder" > "$folder/log" 2>&1
  printf '%s; errors: %s; ' "$(tail -n 1 "$folder/log")" "$(grep -c 'error: ' "$folder/log" || true)"
  "$folder/venv/bin/python" -c 'import stale'
}

{
  install 'int source(void) { return no_number; }'
  install 'int source(void) { return 1; }'
  install 'int source(void) { return no_number + 2; }'
  install 'int source(void) { return no_number + 2; }' --verbose
} | tee "$folder/seen"
diff "$folder/seen" - <<'EOF_SEEN'
Successfully installed stale-1; errors: 0; no library
Successfully installed stale-1; errors: 0; the library of source 1
Successfully installed stale-1; errors: 0; the library of source 1
Successfully installed stale-1; errors: 1; the library of source 1
EOF_SEEN
