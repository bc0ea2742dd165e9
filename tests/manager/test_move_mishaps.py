"""Every message of a move mishandled: lost, answered by silence, doubled, late."""

from __future__ import annotations

import pytest

from tests.manager.machine import quiet_deaths
from tests.manager.movematrix import messages_of_scene, name_of, prepared
from tests.manager.movescenes import SCENES, check
from tests.manager.net import Mishap


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


MISHAPS = [
    (scene, message, what)
    for scene in SCENES
    for message in messages_of_scene(scene.name)
    for what in ("lose", "mute", "twice", "late")
]


@pytest.mark.parametrize(("scene", "message", "what"), MISHAPS, ids=name_of)
def test_messages_lost_doubled_and_late(tmp_path, scene, message, what):
    cell = prepared(scene, tmp_path)
    cell.net.mishaps[message] = Mishap(what, times=2)
    scene.send(cell)
    check(cell, scene)
    # What was held up comes when everything is long decided.
    cell.net.deliver_late()
    cell.quiet()
    check(cell, scene)
    cell.close()


def test_there_are_as_many_mishaps_as_there_should_be():
    assert len(MISHAPS) >= 120
