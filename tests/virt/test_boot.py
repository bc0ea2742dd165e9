from __future__ import annotations

from compute_worker.virt.boot import boot_id


def test_boot_id_is_stable_and_names_kernel_and_first_process():
    assert boot_id() == boot_id()
    kernel, _, started = boot_id().partition("/")
    assert len(kernel) == 36 and started.isdigit()
