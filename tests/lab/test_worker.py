"""Configuration text and the paths a worker needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from oslo_config import cfg

from tests.lab.worker import REPOSITORY, merge_config, python_paths, render_config


def parsed(tmp_path: Path, text: str) -> cfg.ConfigOpts:
    path = tmp_path / "c.conf"
    path.write_text(text)
    conf = cfg.ConfigOpts()
    conf.register_opts([cfg.StrOpt("host"), cfg.StrOpt("url"), cfg.BoolOpt("debug")])
    conf.register_opts([cfg.ListOpt("names"), cfg.IntOpt("count"), cfg.FloatOpt("ratio")], "more")
    conf(["--config-file", str(path)])
    return conf


def test_oslo_config_reads_back_what_was_rendered(tmp_path: Path) -> None:
    conf = parsed(tmp_path, render_config({
        "DEFAULT": {"host": "node1", "url": "rabbit://a:p$w%40@h/v", "debug": True},
        "more": {"names": ["a", "b"], "count": 3, "ratio": 1.5},
    }))
    assert (conf.host, conf.url, conf.debug) == ("node1", "rabbit://a:p$w%40@h/v", True)
    assert (conf.more.names, conf.more.count, conf.more.ratio) == (["a", "b"], 3, 1.5)


def test_a_value_of_two_lines_is_refused() -> None:
    with pytest.raises(ValueError, match="one line"):
        render_config({"DEFAULT": {"host": "a\nb = c"}})


def test_later_layers_win_option_by_option() -> None:
    assert merge_config({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": {"z": 4}}) == {
        "a": {"x": 1, "y": 3}, "b": {"z": 4}}


def test_every_interpreter_on_the_way_is_exposed(tmp_path: Path) -> None:
    real = tmp_path / "real" / "bin"
    alias = tmp_path / "alias" / "bin"
    venv = tmp_path / "venv" / "bin"
    for directory in (real, alias, venv):
        directory.mkdir(parents=True)
    (real / "python3.11").touch()
    os.symlink(real / "python3.11", alias / "python3")
    os.symlink(alias / "python3", venv / "python")
    assert python_paths(venv.parent) == [
        str(venv.parent), str(REPOSITORY), str(alias.parent), str(real.parent)]
