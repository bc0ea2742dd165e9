from __future__ import annotations

import itertools

import pytest

from compute_worker.states import PowerState
from compute_worker.virt.libvirt.snapshot.decision import OFF, ChainFacts, Facts, Method, builds_on_last, decide


@pytest.mark.parametrize("power", list(PowerState))
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("obstacle", ["", "no socket"])
def test_every_guest_has_a_method_and_a_reason(power: PowerState, live: bool, obstacle: str) -> None:
    method, why = decide(Facts(power, live, obstacle))
    assert (method is Method.COLD) == (power in OFF)
    assert (method is Method.BACKUP) == (power not in OFF and live and not obstacle)
    assert why and (method is not Method.SAVED or "live = false" in why or "no socket" in why)


def test_only_where_everything_fits_the_last_is_built_on() -> None:
    reasons = set()
    for wanted, compressed, last, held, there in itertools.product([True, False], repeat=5):
        builds, why = builds_on_last(ChainFacts(wanted, compressed, last, held, there))
        assert builds == (wanted and not compressed and last and held and there)
        reasons.add(why)
    assert len(reasons) == 6
