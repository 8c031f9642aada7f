#!/usr/bin/env bash
# Every check of this repository, from a fresh clone:  bash launch/test.sh [arguments for pytest, such as -m slow]
# Sets up .venv (kept and reused while the requirements stay the same), then lint, format, types and tests with coverage.
# Known vulnerabilities of the pinned versions are a warning, for at most half a minute.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
  sed -n '2,/^set /s/^# //p' launch/test.sh # the lines above
  exit
fi
source launch/environment.sh

TORCH=2.13.0 # the converter's tests compare with PyTorch; its CPU build is enough

install_torch() {
  .venv/bin/python -c "import sys, torch; sys.exit(torch.__version__.split('+')[0] != '$TORCH')" 2>/dev/null && return 0
  echo "Installing PyTorch $TORCH (CPU) …"
  # a CPU wheel that pip already knows of, then PyTorch's own index of CPU builds, then whatever build pip finds
  .venv/bin/python -m pip install --quiet "torch==$TORCH+cpu" 2>/dev/null && return 0
  .venv/bin/python -m pip install --quiet --timeout 15 --retries 1 \
    --extra-index-url https://download.pytorch.org/whl/cpu "torch==$TORCH+cpu" 2>/dev/null && return 0
  .venv/bin/python -m pip install --quiet "torch==$TORCH" && return 0
  echo "PyTorch $TORCH could not be installed: the tests of scl_jax.convert will fail." >&2
}

ensure_environment requirements.txt requirements-dev.txt || exit 1
install_torch
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two pytest workers share the cores
export PATH="$PWD/.venv/bin:$PATH"

summary=""
failed=0
check() { # check NAME COMMAND...: runs it, times it, remembers whether it passed
  local name=$1 start=$SECONDS verdict=passed
  shift
  echo "── $name"
  "$@" || { verdict=FAILED && failed=1; }
  summary+=$(printf '%-8s %s (%d s)' "$name" "$verdict" $((SECONDS - start)))$'\n'
}

echo "── audit"
python launch/audit.py
check lint ruff check .
check format ruff format --check .
types_log=$(mktemp)
pyright --pythonpath .venv/bin/python >"$types_log" 2>&1 & # beside the tests
types=$!
# a file's tests share fixtures and what is compiled: one worker has them all
check tests python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term "$@"
check types wait "$types"
cat "$types_log"
rm -f "$types_log"

printf '\n%s' "$summary"
exit $failed
