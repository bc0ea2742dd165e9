"""QEMU and KVM guests through libvirt.

:mod:`~compute_worker.virt.libvirt.host` holds the one connection, :mod:`~compute_worker.virt.libvirt.guest` one
domain, :mod:`~compute_worker.virt.libvirt.domain` its XML. Nothing outside these calls the binding.
"""

import importlib.util

if importlib.util.find_spec("libvirt") is None:
    raise ImportError(
        "the libvirt driver needs the Python module 'libvirt': install compute-worker[libvirt] "
        "(libvirt-python, built against libvirt-dev), or choose another compute_driver"
    )
