"""The package without its binding."""

import subprocess
import sys

CODE = """
import sys
sys.modules["libvirt"] = None
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "libvirt" else find_spec(name, *rest)
import compute_worker.virt.libvirt.host
"""


def test_a_missing_binding_is_one_clear_error():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the libvirt driver needs the Python module 'libvirt': install compute-worker")
    assert "During handling" not in result.stderr
