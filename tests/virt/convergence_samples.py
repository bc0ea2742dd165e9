"""Statistics of live migrations between two hosts of the lab (QEMU 7.2, a guest of 96 MiB): as libvirt told them where
nothing else is said, every tenth or so.

(seconds, iteration, memory remaining, memory processed, memory rate, disk processed), bytes.
"""

from __future__ import annotations

Sample = tuple[float, int, int, int, int | None, int]

CONVERGES: list[Sample] = [
    (0.51, 0, 0, 0, None, 65_536),
    (1.51, 0, 0, 0, None, 65_536),
    (1.52, 2, 14_225_408, 81_967_141, 178_839_916, 65_536),
    (1.58, 3, 3_969_024, 92_954_160, 241_402_732, 65_536),
    (1.64, 4, 0, 97_329_069, 241_402_732, 65_536),
    (1.65, 4, 0, 97_329_069, 239_617_384, 65_536),
]
"""A guest that rewrites 8 MiB for ever, and a link that carries 240 MB a second."""

SLOW_LINK: list[Sample] = [
    (0.56, 0, 0, 0, None, 0),
    (1.11, 0, 0, 0, None, 65_536),
    (3.11, 1, 98_349_056, 2_136_398, 1_067_220, 65_536),
    (7.62, 1, 95_686_656, 4_804_198, 1_067_220, 65_536),
    (13.14, 1, 87_678_976, 12_807_643, 1_016_400, 65_536),
    (18.65, 1, 81_543_168, 18_677_415, 1_067_220, 65_536),
    (25.67, 1, 74_194_944, 26_040_543, 1_026_173, 65_536),
    (33.69, 1, 67_280_896, 32_444_415, 1_067_220, 65_536),
    (38.7, 1, 59_932_672, 39_807_543, 1_056_653, 65_536),
    (48.22, 1, 51_355_648, 47_705_761, 1_067_220, 65_536),
    (58.29, 1, 33_476_608, 60_407_738, 1_016_400, 65_536),
    (71.83, 1, 15_126_528, 74_712_015, 1_046_294, 65_536),
]
"""One pass over memory takes more than a minute at 1 MiB a second."""

STALLS: list[Sample] = [
    (0.5, 0, 0, 0, None, 65_536),
    (2.5, 1, 60_000_000, 38_000_000, 8_400_000, 65_536),
    (7.0, 1, 4_100_000, 79_000_000, 8_400_000, 65_536),
    (7.5, 2, 2_950_000, 84_000_000, 8_400_000, 65_536),
    (8.0, 3, 2_850_000, 88_000_000, 8_390_000, 65_536),
    (8.5, 4, 2_870_000, 92_000_000, 8_400_000, 65_536),
    (9.0, 5, 2_860_000, 96_000_000, 8_400_000, 65_536),
    (9.5, 6, 2_855_000, 100_000_000, 8_400_000, 65_536),
]
"""Made up, not recorded: after a guest on a link of 8 MiB a second whose iterations left 2.8 and 2.7 MiB."""

SILENT_DISK: list[Sample] = [
    (0.5, 0, 0, 0, None, 1_000_000),
    (1.0, 0, 0, 0, None, 9_000_000),
    (6.0, 0, 0, 0, None, 9_000_000),
    (15.9, 0, 0, 0, None, 9_000_000),
    (16.1, 0, 0, 0, None, 9_000_000),
]
"""The cable is pulled while a disk is copied. Made from a recorded beginning."""
