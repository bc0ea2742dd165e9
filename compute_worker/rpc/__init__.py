"""Messages in and out: transport, the worker's server, the client, the wire form and its description.

Importing this package imports oslo.messaging with threads as its only concurrency: eventlet, which oslo.service would
load where it is installed, stays out (it costs 0.2 s and 17 MiB). A program that has chosen eventlet before is left as
it is.
"""

from __future__ import annotations

import sys


def _import_messaging_with_threads() -> None:
    from oslo_service import backend

    try:
        backend.init_backend(backend.BackendType.THREADING)
        import oslo_messaging._drivers.impl_rabbit  # noqa: F401
    except (backend.exceptions.BackendAlreadySelected, ValueError):
        return  # chosen by the program around us, or oslo.service has no threading backend here


def _hide_eventlet() -> None:
    hidden = "eventlet" not in sys.modules and "oslo_messaging" not in sys.modules
    if hidden:
        sys.modules["eventlet"] = None  # type: ignore[assignment]  # how Python spells "cannot be imported"
    try:
        _import_messaging_with_threads()
    finally:
        if hidden:
            del sys.modules["eventlet"]


_hide_eventlet()
