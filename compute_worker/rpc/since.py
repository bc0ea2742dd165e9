"""Which version of the messages brought which: data alone."""

from __future__ import annotations

from collections.abc import Mapping

SINCE: Mapping[str, str] = dict.fromkeys(
    (
        "prep_resize",
        "confirm_resize",
        "revert_resize",
        "take_back_instance",
        "forget_host",
        "resize_instance",
        "finish_resize",
        "finish_revert_resize",
        "settle_operation",
        "get_migration",
        "list_migrations",
        "answer_peer",
        "peer_changed",
        "check_can_live_migrate_destination",
        "check_can_live_migrate_source",
        "get_hypervisor",
        "live_migration",
        "live_migration_abort",
        "snapshot_instance",
        "snapshot",
        "backup_instance",
        "list_images",
        "list_cached_images",
        "live_migration_force_complete",
        "pre_live_migration",
        "list_leftovers",
        "repair_leftovers",
    ),
    "1.1",
)
"""Version that brought a message, where it is not ``1.0``: what a pinned client refuses to send."""
