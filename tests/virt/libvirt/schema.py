"""Validation against libvirt's own RNG schema: in process for many documents, by virt-xml-validate for a few."""

import functools
import pathlib
import subprocess

from lxml import etree

SCHEMA = pathlib.Path("/usr/share/libvirt/schemas/domain.rng")


@functools.cache
def _relaxng() -> etree.RelaxNG:
    return etree.RelaxNG(etree.parse(SCHEMA))


def errors_of(xml: str) -> list[str]:
    """What the schema says against the document; empty when it is valid."""
    schema = _relaxng()
    if schema.validate(etree.fromstring(xml)):
        return []
    return [str(error) for error in schema.error_log]


def virt_xml_validate(xml: str, path: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Run libvirt's own validator on the document, written to ``path``."""
    path.write_text(xml)
    return subprocess.run(["virt-xml-validate", str(path), "domain"], capture_output=True, text=True, check=False)
