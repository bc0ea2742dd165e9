from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compute_worker.operations.admission import Admission, Ticket

actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(["a", "b", "c", None]), st.sampled_from(["build", "power", "free"])),
        st.tuples(st.just("done"), st.integers(0, 9), st.none()),
    ),
    max_size=60,
)


@given(actions)
def test_limits_order_and_no_one_is_forgotten(script):
    limits = {"build": 1, "power": 2}
    admission = Admission(limits)
    tickets, running, started = {}, [], []

    def start(new):
        for ticket in new:
            running.append(ticket)
            started.append(ticket.id)

    def check():
        held = [t.instance for t in running if t.instance]
        assert len(held) == len(set(held))
        for name, limit in limits.items():
            assert sum(t.limit == name for t in running) <= limit
        assert admission.waiting == len(tickets) - len(started)

    for action, value, limit in script:
        if action == "add":
            ticket = Ticket(len(tickets), value, limit)
            tickets[ticket.id] = ticket
            start(admission.add(ticket))
        elif running:
            start(admission.done(running.pop(value % len(running)).id))
        check()
    while running:
        start(admission.done(running.pop(0).id))
        check()
    assert sorted(started) == sorted(tickets)
    for instance in ("a", "b", "c"):
        mine = [i for i in started if tickets[i].instance == instance]
        assert mine == sorted(mine)
