"""Run phases of the checks one after the other, whatever fails, and close with one line that counts all tests.

Usage: run_tests.py PHASE... [-- PYTEST_ARGUMENT...]. Exit status 0: every phase was good. A phase in which pytest finds
nothing to run is a failure, unless arguments were given that may have left nothing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable, "-m"]

# Whole files go to one process: what a module's fixtures start is not started twice. Cells wait more than they compute,
# so that `make lab` has two at a time; in `make test` each has the machine alone.
PHASES: dict[str, list[list[str]]] = {
    "lint": [["ruff", "check", "."], ["mypy"]],
    "unit": [["pytest", "-n", "4", "--dist", "loadfile", "-m", "not lab"]],
    "cell": [["pytest", "-m", "lab and not lab_full"]],
    "lab": [["pytest", "-n", "2", "--dist", "loadfile", "-m", "lab"]],
}
NOTHING_TO_RUN = 5


class Counts(NamedTuple):
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def counts_of(report: Path) -> Counts:
    """What pytest's JUnit report says; one failure when pytest died before it wrote one."""
    if not report.exists():
        return Counts(failed=1)
    total = Counts()
    for suite in ET.parse(report).getroot().iter("testsuite"):
        tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        total = total.plus(Counts(tests - failed - skipped, failed, skipped))
    return total


def call(command: list[str]) -> int:
    return subprocess.run([*PYTHON, *command], check=False, cwd=ROOT, stdin=subprocess.DEVNULL).returncode


def run(command: list[str], arguments: list[str]) -> tuple[bool, Counts]:
    if command[0] != "pytest":
        return call(command) == 0, Counts()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        status = call([*command, f"--junitxml={report}", *arguments])
        if status == NOTHING_TO_RUN:
            return bool(arguments), Counts()
        return status == 0, counts_of(report)


def main(words: list[str]) -> int:
    split = words.index("--") if "--" in words else len(words)
    phases, arguments = words[:split], words[split + 1 :]
    unknown = set(phases) - PHASES.keys()
    if unknown or not phases:
        print(f"phases are {', '.join(PHASES)}; not {', '.join(sorted(unknown)) or 'none'}", file=sys.stderr)
        return 2
    total, bad = Counts(), []
    for phase in phases:
        for command in PHASES[phase]:
            began = time.monotonic()
            good, counts = run(command, arguments)
            total = total.plus(counts)
            verdict = "good" if good else "FAILED"
            print(f"== {phase}: {command[0]} {verdict}, {time.monotonic() - began:.0f} s", flush=True)
            if not good:
                bad.append(f"{phase} ({command[0]})")
    if bad:
        print(f"failed: {', '.join(bad)}")
    if sum(total):
        print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
