from __future__ import annotations

from compute_worker.demo.embedded import EmbeddedDemo

GUEST = EmbeddedDemo.guest
CONSOLE = "boot aa\ntick 1\ntick 20\nPower down\nboot bb\n"


def test_boots_and_clean_shutdowns() -> None:
    assert GUEST.boots(CONSOLE) == 2 and GUEST.clean_shutdowns(CONSOLE) == 1
    assert GUEST.boots("") == GUEST.clean_shutdowns("") == 0


def test_the_last_tick_is_of_the_last_boot() -> None:
    assert GUEST.last_tick(CONSOLE) == -1
    assert GUEST.last_tick(CONSOLE + "tick 3\n") == 3
    assert GUEST.last_tick("tick 7\n") == 7, "a console that lost its beginning"
    assert GUEST.last_tick("boot aa\ntick 1\ntick 20\n") == 20
