from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compute_worker.operations.admission import Admission, Ticket

actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(["a", "b", "c", None]), st.sampled_from(["build", "power", "free"])),
        st.tuples(st.just("done"), st.integers(0, 9), st.none()),
        st.tuples(st.just("expedite"), st.integers(0, 9), st.none()),
    ),
    max_size=60,
)


@given(actions)
def test_limits_order_and_no_one_is_forgotten(script):
    limits = {"build": 1, "power": 2}
    admission = Admission(limits)
    tickets, running, started, urgent = {}, [], [], set()

    def start(new):
        for ticket in new:
            running.append(ticket)
            started.append(ticket.id)

    def check():
        held = [t.instance for t in running if t.instance]
        assert len(held) == len(set(held))
        for name, limit in limits.items():
            assert sum(t.limit == name and t.id not in urgent for t in running) <= limit
        assert admission.waiting == len(tickets) - len(started)

    for action, value, limit in script:
        if action == "add":
            ticket = Ticket(len(tickets), value, limit)
            tickets[ticket.id] = ticket
            start(admission.add(ticket))
        elif action == "expedite" and tickets:
            id_ = value % len(tickets)
            if id_ not in started:
                urgent.add(id_)
                start(admission.expedite(id_))
                first = min(
                    (
                        t.id
                        for t in tickets.values()
                        if t.instance == tickets[id_].instance and (t.id not in started or t in running)
                    ),
                    default=id_,
                )
                assert id_ in started or (tickets[id_].instance is not None and first != id_)
        elif action == "done" and running:
            start(admission.done(running.pop(value % len(running)).id))
        check()
    while running:
        start(admission.done(running.pop(0).id))
        check()
    assert sorted(started) == sorted(tickets)
    for instance in ("a", "b", "c"):
        mine = [i for i in started if tickets[i].instance == instance]
        assert mine == sorted(mine)
