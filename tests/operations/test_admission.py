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


waits = st.lists(
    st.tuples(st.sampled_from(["add", "done", "yield", "claim", "aside"]), st.integers(0, 9)), max_size=60
)


@given(waits)
def test_who_waits_for_somebody_else_leaves_room_and_comes_back_when_there_is_some(script):
    """``limit`` is never exceeded by those that work; nobody who came back is forgotten, each in turn."""
    limit = 2
    admission = Admission({"move": limit})
    tickets, working, away, back = [], [], [], []

    def start(new):
        for ticket in new:
            if ticket in back:
                back.remove(ticket)
            working.append(ticket)

    for action, value in script:
        if action == "add":
            tickets.append(Ticket(len(tickets), None, "move"))
            start(admission.add(tickets[-1]))
        elif action == "yield" and working:
            ticket = working.pop(value % len(working))
            away.append(ticket)
            start(admission.yield_slot(ticket.id))
            assert admission.yield_slot(ticket.id) == []
        elif action == "claim" and away:
            ticket = away.pop(value % len(away))
            back.append(ticket)
            start(admission.claim_slot(ticket.id))
        elif action == "done" and (there := working + away + back):
            ticket = there[value % len(there)]
            for group in (working, away, back):
                if ticket in group:
                    group.remove(ticket)
            start(admission.done(ticket.id))
        elif action == "aside" and away:
            start(admission.step_aside(away[value % len(away)].id))
            assert admission.claim_slot(away[value % len(away)].id) == [away.pop(value % len(away))]
        assert len(working) <= limit
        assert admission.running().get("move", 0) == len(working)
        assert not (admission.waiting and len(working) < limit), "there is room, and somebody waits"
        assert admission.waiting >= len(back)


def test_its_instances_line_is_kept():
    admission = Admission({"move": 1})
    first, second, other = Ticket(1, "a", "move"), Ticket(2, "a", "move"), Ticket(3, "b", "move")
    assert admission.add(first) == [first]
    assert admission.add(second) == admission.add(other) == []
    assert admission.yield_slot(1) == [other]
    assert admission.claim_slot(1) == []
    assert admission.done(3) == [first]
    assert admission.done(1) == [second]
