"""Virt drivers: the contract in :mod:`compute_worker.virt.driver`, the simulated host and libvirt behind it."""
