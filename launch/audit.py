"""Asks PyPI's database whether the pinned versions have known vulnerabilities: `python launch/audit.py [FILE…]`.

A warning, never a failure: what is found today was not there when the versions were pinned, and the answer needs a
network. Prints one line, and one for each vulnerability; its exit status is always 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

TIME_LIMIT = 30  # seconds for everything
FILES = ("requirements.txt", "requirements-dev.txt")


def ask(files: list[str]) -> str:
    """What there is to say about the pinned versions of these files."""
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off"]
    command += ["--timeout=10", "--format=json", *(f"--requirement={file}" for file in files)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return f"not audited: no answer from the vulnerability service within {TIME_LIMIT} s"
    try:
        return told(json.loads(answer.stdout)["dependencies"])
    except (ValueError, KeyError):
        reason = (answer.stderr.strip() or "no answer").splitlines()[-1]
        return f"not audited: {reason[:200]}"


def told(packages: list[dict[str, Any]]) -> str:
    """pip-audit's findings in words."""
    known = [package for package in packages if "vulns" in package]
    found = [(package, vulnerability) for package in known for vulnerability in package["vulns"]]
    lines = [f"{len(known)} of {len(packages)} pinned packages are known to the vulnerability service"]
    lines[0] += f"; {len(found)} known vulnerabilities" if known else ": not audited (no access to it?)"
    for package, vulnerability in found:
        fixed = ", ".join(vulnerability.get("fix_versions", ())) or "no version yet"
        lines.append(f"  warning: {package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(ask(sys.argv[1:] or list(FILES)))
