"""compute_worker: the agent on every hypervisor host that turns messages into virtual machines."""
