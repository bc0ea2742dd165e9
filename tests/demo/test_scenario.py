from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from compute_worker.ctl.output import Output
from compute_worker.demo import scenario
from compute_worker.demo.embedded import EmbeddedDemo, embedded_demo
from compute_worker.demo.stage import SceneFailed, Stage


@pytest.fixture
def stage() -> Iterator[Stage]:
    with embedded_demo() as cell:
        yield Stage(cell, Output(stdout=io.StringIO(), stderr=io.StringIO()))


def test_titles_tell_the_scenes_apart() -> None:
    titles = [scene.title for scene in scenario.SCENES]
    assert len(set(titles)) == len(titles) and all(titles)


def test_what_is_left_over_is_found(stage: Stage) -> None:
    assert scenario.nothing_left(stage)
    scenario.boot_with_kernel(stage)
    with pytest.raises(SceneFailed, match=r"node1: directory .*node1: domain|node1: domain .*node1: directory"):
        scenario.nothing_left(stage)
    scenario.delete(stage)
    assert scenario.nothing_left(stage)


def test_a_guest_that_does_not_listen_is_no_clean_stop(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario.boot_with_kernel(stage)
    scenario.boot_from_disk(stage)
    scenario.consoles(stage)
    real = stage.api.stop_instance
    monkeypatch.setattr(stage.api, "stop_instance", lambda uuid, host: real(uuid, False, host=host))
    with pytest.raises(SceneFailed, match="0 clean shutdowns, not 1"):
        scenario.stop(stage)


def test_a_build_that_was_not_cut_is_no_proof(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("arm", "until_under_way", "kill_worker", "start_worker"):
        monkeypatch.setattr(EmbeddedDemo, name, lambda *args: None)
    with pytest.raises(SceneFailed, match="no step of the build was cut"):
        scenario.kill_worker(stage)
