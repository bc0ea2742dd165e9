from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.images.support import Job, Site, web_server


@pytest.fixture
def job() -> Job:
    return Job()


@pytest.fixture
def site() -> Iterator[Site]:
    with web_server(Site()) as running:
        yield running
