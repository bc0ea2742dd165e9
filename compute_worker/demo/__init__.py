"""One scenario, against two hosts in one process or two real ones: :mod:`.scenario` is the script, a
:class:`~compute_worker.demo.cell.DemoCell` what it runs against."""
