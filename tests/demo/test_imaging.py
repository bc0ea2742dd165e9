from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from compute_worker.ctl.output import Output
from compute_worker.demo import imaging, scenario
from compute_worker.demo.embedded import embedded_demo
from compute_worker.demo.stage import FIRST, SceneFailed, Stage


@pytest.fixture
def stage() -> Iterator[Stage]:
    with embedded_demo() as cell:
        stage = Stage(cell, Output(stdout=io.StringIO(), stderr=io.StringIO()))
        scenario.boot_with_kernel(stage)
        stage.booted(FIRST, 1)
        yield stage


def test_the_scenes_in_order(stage: Stage) -> None:
    seen = [scene.play(stage) for scene in imaging.SCENES]
    assert "qcow2 of " in seen[0] and "silent for" in seen[0]
    assert "copy ticks on node2" in seen[1]
    assert all(" read" in line for line in (seen[0], seen[2], seen[3]))
    assert imaging.COPY not in stage.memory.guests
    scenario.delete(stage)
    assert scenario.nothing_left(stage)


def test_an_image_that_the_other_host_does_not_see_is_no_success(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.api, "list_images", lambda *args, **options: [])
    with pytest.raises(SceneFailed, match="does not see the image"):
        imaging.boot_a_second(stage)
    with pytest.raises(SceneFailed, match="the store lists"):
        imaging.live(stage)
