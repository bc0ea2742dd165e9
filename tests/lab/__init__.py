"""The lab: a cell of real libvirt hosts on one machine, each in namespaces of its own.

Nothing is left on the machine: no link, no route, no mount, no process; only the state directory
of the cell, which goes with it.  `tests.lab.cell.Cell` is the entry point for tests, `tools/lab`
the one for a person.
"""
