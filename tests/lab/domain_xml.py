"""A hand-written domain of the lab's guest, for tests of the lab and as a bare baseline."""

from __future__ import annotations

from dataclasses import dataclass

from tests.lab.guest_images import MEMORY_MIB

TEMPLATE = """\
<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>{boot}</os>
  <features><acpi/></features>
  <on_reboot>restart</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='{disk_format}'/>
      <source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>{extra}
    <interface type='bridge'>
      <mac address='{mac}'/><source bridge='br0'/><model type='virtio'/>
    </interface>
    <serial type='pty'><log file='{console}' append='on'/><target port='0'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <memballoon model='virtio'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>
"""


@dataclass(frozen=True)
class GuestDomain:
    """What differs from one guest to the next; `kernel` empty means it boots from its disk."""

    name: str
    uuid: str
    disk: str
    console: str
    disk_format: str = "raw"
    kernel: str = ""
    initrd: str = ""
    cmdline: str = ""
    mac: str = "52:54:00:1a:b0:01"
    extra_devices: str = ""

    def xml(self) -> str:
        """The domain XML; plain values only, nothing is escaped."""
        boot = "<boot dev='hd'/>"
        if self.kernel:
            cmdline = f"console=ttyS0 quiet {self.cmdline}".strip()
            boot = (f"<kernel>{self.kernel}</kernel><initrd>{self.initrd}</initrd>"
                    f"<cmdline>{cmdline}</cmdline>")
        return TEMPLATE.format(
            name=self.name, uuid=self.uuid, memory=MEMORY_MIB, boot=boot, mac=self.mac,
            disk_format=self.disk_format, disk=self.disk, console=self.console,
            extra=self.extra_devices,
        )
