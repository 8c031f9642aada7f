#!/usr/bin/env bash
# Sourced by the other scripts: a Python environment in .venv that holds exactly the pinned versions.
#   ensure_environment FILE...   installs each requirements file once, again when the file or Python has changed

find_python() { # prints the first interpreter that is Python 3.11 to 3.13 and can make environments
  local candidate
  for candidate in "${PYTHON:-python3}" python3.12 python3.13 python3.11; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  return 1
}

make_environment() {
  local python
  if python=$(find_python); then
    "$python" -m venv .venv
  elif command -v uv >/dev/null; then
    uv venv --quiet --seed --python 3.12 .venv # uv brings an interpreter of its own
  else
    echo "Python 3.11, 3.12 or 3.13 with its venv module is needed and none was found (on Debian: apt-get install python3-venv)." >&2
    echo "Install one, or name it: PYTHON=/path/to/python3.12 $0" >&2
    return 1
  fi
}

find_uv() { # prints a path of uv, which does in seconds what pip does in minutes; brings it where pip can
  command -v uv && return 0
  [[ -x .venv/bin/uv ]] || .venv/bin/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null
  [[ -x .venv/bin/uv ]] && echo .venv/bin/uv
}

pip_install() { # by uv where it is to be had and finds everything, else by pip
  local uv
  if uv=$(find_uv) && "$uv" pip install --quiet --python .venv/bin/python "$@" 2>/dev/null; then
    return 0
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
}

ensure_environment() {
  local file stamp fingerprint
  [[ -x .venv/bin/python ]] && .venv/bin/python -c '' 2>/dev/null || { rm -rf .venv && make_environment; } || return 1
  for file in "$@"; do
    stamp=".venv/.installed-$(basename "$file")"
    fingerprint=$(.venv/bin/python -c 'import hashlib, sys; print(sys.version.split()[0], hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$file")
    if [[ ! -f $stamp || $(cat "$stamp") != "$fingerprint" ]]; then
      echo "Installing $file …"
      pip_install -r "$file" || { echo "$file could not be installed; see pip's message above." >&2; return 1; }
      echo "$fingerprint" >"$stamp"
    fi
  done
}
