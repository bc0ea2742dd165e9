from __future__ import annotations

from tests.ctl.conftest import cell  # noqa: F401
