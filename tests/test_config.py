"""Options: each with help and bounds, the same by oslo.config and by hand."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from oslo_config import cfg

from compute_worker.config import Compute, Settings, load, oslo_opts, register

ALL = [(group, opt) for group, opts in oslo_opts() for opt in opts]
each = pytest.mark.parametrize(("group", "opt"), ALL, ids=[f"{g}.{o.name}" for g, o in ALL])


def conf_of(tmp_path: Path, text: str) -> cfg.ConfigOpts:
    path = tmp_path / "worker.conf"
    path.write_text(text)
    conf = cfg.ConfigOpts()
    register(conf)
    conf(["--config-file", str(path)])
    return conf


def empty() -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    register(conf)
    conf([], default_config_files=[], default_config_dirs=[])
    return conf


def test_settings_made_by_hand_are_the_defaults() -> None:
    assert load(empty()) == Settings()


def test_every_field_of_settings_is_a_registered_group() -> None:
    assert [group for group, _ in oslo_opts()] == [field.name for field in dataclasses.fields(Settings)]


@each
def test_every_option_has_help(group: str, opt: cfg.Opt) -> None:
    assert opt.help and opt.help.endswith(".") and len(opt.help) > 10


@each
def test_every_default_keeps_its_own_bounds(group: str, opt: cfg.Opt) -> None:
    opt.type(opt.default)


@each
def test_every_number_has_a_lower_bound(group: str, opt: cfg.Opt) -> None:
    if isinstance(opt, cfg.IntOpt | cfg.FloatOpt):
        assert opt.type.min is not None


@each
def test_out_of_bounds_is_refused_by_name(group: str, opt: cfg.Opt, tmp_path: Path) -> None:
    if isinstance(opt, cfg.IntOpt | cfg.FloatOpt):
        bad = str(opt.type.min - 1)
    elif isinstance(opt, cfg.BoolOpt):
        bad = "perhaps"
    elif getattr(opt.type, "choices", None):
        bad = "none-of-them"
    else:
        return  # any text will do
    conf = conf_of(tmp_path, f"[{group}]\n{opt.name} = {bad}\n")
    with pytest.raises(cfg.ConfigFileValueError, match=opt.name):
        load(conf)


def test_values_of_a_file_arrive(tmp_path: Path) -> None:
    text = "[compute]\nhost = h7\nstep_attempts = 9\n[fake]\nlatency = 0.5\n[libvirt]\nguest_agent = false\n"
    found = load(conf_of(tmp_path, text))
    assert found.host == "h7"
    assert (found.compute.step_attempts, found.fake.latency, found.libvirt.guest_agent) == (9, 0.5, False)
    assert found.images == Settings().images


def test_host_is_the_machine_s_name_by_default() -> None:
    assert Settings().host == socket.gethostname()
    assert Settings(compute=Compute(host="x")).host == "x"


def test_instances_live_below_the_state_path_by_default() -> None:
    assert Settings(compute=Compute(state_path="/s")).instances_path == "/s/instances"
    assert Settings(compute=Compute(state_path="/s", instances_path="/i")).instances_path == "/i"


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().compute.host = "other"  # type: ignore[misc]


def test_what_looks_secret_is_marked_so() -> None:
    for _, opt in ALL:
        if any(word in opt.name for word in ("password", "secret", "token")):
            assert opt.secret, opt.name


def test_nothing_is_registered_at_import() -> None:
    # In a process of its own: in this one other tests have registered them.
    script = (
        "import compute_worker.config, compute_worker.worker, compute_worker.cmd.worker, compute_worker.cmd.ctl\n"
        "from oslo_config import cfg\n"
        "print(sorted({'compute', 'claims', 'fake'} & cfg.CONF._groups.keys()))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout == "[]\n"
