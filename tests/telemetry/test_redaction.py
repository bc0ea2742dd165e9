"""No secret gets through, and what is no secret does."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker.telemetry.redaction import MASK, Redactor, passwords_of

SECRET = "s3cr3t-Pa55"


@pytest.mark.parametrize(
    "line",
    [
        f"cannot reach amqp://cw:{SECRET}@broker:5672//",
        f"rabbit://a:{SECRET}@h1:5672,b:{SECRET}@h2:5672/vhost refused",
        f"amqps://:{SECRET}@[::1]:5671/",
        f"{{'admin_password': '{SECRET}', 'x': 1}}",
        f'{{"admin_password": "{SECRET}"}}',
        f'body={{\\"admin_password\\": \\"{SECRET}\\"}}',
        f"adminPass={SECRET}&x=1",
        f"admin_password=b'{SECRET}'",
        f"password => {SECRET}, next",
        f"X-Auth-Token: {SECRET}",
        f"Authorization: Bearer {SECRET}",
        f'"admin_password": "quote \\" {SECRET}"',
    ],
)
def test_a_secret_in_a_place_for_secrets_is_masked(line: str) -> None:
    assert SECRET not in Redactor()(line)
    assert MASK in Redactor()(line)


def test_everything_else_of_the_line_stays() -> None:
    assert Redactor()(f"amqp://cw:{SECRET}@broker:5672//vh is down") == f"amqp://cw:{MASK}@broker:5672//vh is down"
    assert Redactor()("{'admin_password': 'abc', 'uuid': 'u'}") == f"{{'admin_password': '{MASK}', 'uuid': 'u'}}"


@pytest.mark.parametrize(
    "line",
    [
        "instance 7f0c at node1:5672 runs; 3 operations: build, power",
        "http://images/a.qcow2 is 12 MiB",
        "passing 3 of 4 checks, token bucket full",
        "mail operator@example.org about it",
        "",
    ],
)
def test_what_is_no_secret_stays(line: str) -> None:
    assert Redactor()(line) == line


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=6, max_size=40), st.text(max_size=20))
def test_a_known_secret_never_gets_through(secret: str, around: str) -> None:
    redact = Redactor([secret])
    if secret.lower() in ("guest", "password", "rabbit", "rabbitmq", "compute"):
        return
    assert secret not in redact(f"{around}{secret}{around}").replace(MASK, "")


@given(st.dictionaries(st.sampled_from(["admin_password", "password", "name"]), st.text(max_size=30), min_size=1))
def test_json_stays_json(body: dict[str, str]) -> None:
    masked = json.loads(Redactor()(json.dumps(body)))
    assert masked.keys() == body.keys()
    assert all(masked[k] == MASK for k in body if k != "name")


def test_common_and_short_words_are_not_taken_for_secrets() -> None:
    assert Redactor(["guest", "ab"])("the guest is abroad") == "the guest is abroad"


def test_a_quoted_form_of_a_known_secret_is_known_too() -> None:
    redact = Redactor(["p@ss/word!"])
    assert "p%40ss%2Fword%21" not in redact("it said p%40ss%2Fword%21 there")


@pytest.mark.parametrize(
    ("url", "passwords"),
    [
        ("rabbit://u:one@h:5672/v", ["one"]),
        ("rabbit://u:one@h1,u:two@h2/v", ["one", "two"]),
        ("rabbit://h/v", []),
        ("kombu+memory://", []),
        (None, []),
        ("nonsense", []),
        ("rabbit://u:x@[broken/v", []),
    ],
)
def test_passwords_of(url: str | None, passwords: list[str]) -> None:
    assert passwords_of(url) == passwords
