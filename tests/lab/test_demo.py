"""The scenario on two real hosts, as `make demo` runs it: two minutes or more, as real guests boot ten times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compute_worker.demo.scenario import SCENES
from tests.lab import demo

ROOT = Path(__file__).parents[2]


@pytest.mark.lab
@pytest.mark.timeout(400)
def test_every_scene_is_good_and_nothing_stays(lab_machine: None, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "compute_worker.cmd.demo", "--real"]
    done = subprocess.run(program, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SCENES)} of {len(SCENES)} steps good" in done.stdout
    assert "(2 attempts)" in done.stdout, "the build was cut"
    assert "nothing left over" in done.stdout.splitlines()[-2]


@pytest.mark.parametrize(("arguments", "status"), [([], demo.CANNOT), (["--or-embedded"], 0)])
def test_a_machine_that_cannot(
    arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "missing", lambda: ["root: the lab makes namespaces and mounts"])
    monkeypatch.setattr(demo, "embedded", lambda: 0)
    assert demo.main(arguments) == status
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "two real hosts need root" in told[0]
    assert (demo.INSTEAD in told[0]) == bool(arguments)
