"""What virtual interfaces are plugged into. The hypervisor's daemon makes and plugs the taps themselves."""
