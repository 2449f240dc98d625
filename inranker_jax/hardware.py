"""Published figures of accelerators: peaks, memory, and how fast they talk to each other.

They turn measured rates into shares of the possible (`telemetry`) and counted work into estimated times (`aot`).
Sources:

- TPUs: docs.cloud.google.com/tpu/docs, the pages of v4, v5e, v5p and v6e. Their inter-chip figures count both
  directions; v4, of which none is given, has six links of 50 GB/s (Jouppi et al. 2023, "TPU v4", table 4). The
  data-centre network: "How to scale your model" (Austin et al. 2025, jax-ml.github.io/scaling-book), "TPU specs". What
  programs may use of the memory: libtpu 0.0.51, in its error for a program that needs more. Clocks: the peak over the
  operations of a cycle, 2 x 128 x 128 for each of the four matrix units of a core (v6e: 256 x 256); v4's is published.
- GPUs: NVIDIA's data sheets of A100 (2021), H100 (2023) and H200 (2024), dense rates; NVLink there counts both
  directions too. The network is what a DGX has for each GPU: 200 Gbit/s beside an A100, 400 beside the others.

A float32 product runs in fewer bits by default in JAX: in one bfloat16 pass on a TPU, in TF32 on these GPUs. The
float32 peaks are those; with `jax_default_matmul_precision="highest"` real ones are six times lower and more.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator: a TPU chip with all its cores, or a GPU.

    Attributes:
      name: short name, such as "v5e".
      peak_flops: dense FLOP/s of matrix products by the operands' dtype, "bfloat16" and "float32".
      hbm_bytes: bytes of its memory.
      hbm_bandwidth: bytes per second to and from it.
      ici_bandwidth: bytes per second to neighbours over all links, one direction (ICI or NVLink).
      ici_links: links between which that is divided; 1 where all go to one switch.
      dcn_bandwidth: bytes per second to other slices or nodes, one direction.
      cores: parts that Google's accelerator types count as one: TensorCores of a TPU chip.
      program_bytes: bytes of the memory that programs may use, the rest being the runtime's; None where unknown.
      clock: cycles per second of its cores; None for GPUs.
    """

    name: str
    peak_flops: Mapping[str, float]
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    ici_links: int
    dcn_bandwidth: float
    cores: int = 1
    program_bytes: int | None = None
    clock: float | None = None


def _tpu(
    name: str,
    teraflops: float,
    gib: int,
    usable: float,
    hbm: float,
    ici: float,
    links: int,
    dcn: float,
    cores: int,
    clock: float,
) -> Chip:
    peaks = dict.fromkeys(("bfloat16", "float32"), teraflops * 1e12)
    rates = (hbm * 1e9, ici * 1e9, links, dcn * 1e9)
    program_bytes = int(usable * GIB)
    return Chip(name, peaks, gib * GIB, *rates, cores=cores, program_bytes=program_bytes, clock=clock * 1e9)


def _gpu(name: str, bfloat16: float, tf32: float, gb: int, hbm: float, nvlink: float, dcn: float) -> Chip:
    peaks = {"bfloat16": bfloat16 * 1e12, "float32": tf32 * 1e12}
    return Chip(name, peaks, gb * GIB, hbm * 1e9, nvlink * 1e9, 1, dcn * 1e9)


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v4", 275, 32, 30.75, 1200, 300, 6, 6.25, 2, 1.05),
        _tpu("v5e", 197, 16, 15.75, 819, 200, 4, 3.125, 1, 1.5),
        _tpu("v5p", 459, 95, 95.73, 2765, 600, 6, 6.25, 2, 1.75),
        _tpu("v6e", 918, 32, 31.24, 1600, 400, 4, 12.5, 1, 1.75),
        _gpu("A100-40GB", 312, 156, 40, 1555, 300, 25),
        _gpu("A100-80GB", 312, 156, 80, 2039, 300, 25),
        _gpu("H100-SXM", 989, 494.5, 80, 3350, 450, 50),
        _gpu("H100-PCIe", 756, 378, 80, 2000, 64, 50),
        _gpu("H200", 989, 494.5, 141, 4800, 450, 50),
    )
}

# JAX's `device_kind` of each; the first that is found in it counts.
_KINDS = (
    (r"^TPU v4$", "v4"),
    (r"^TPU v5( lite|e)$", "v5e"),
    (r"^TPU v5p?$", "v5p"),
    (r"^TPU v6( lite|e)$", "v6e"),
    (r"A100.*80GB", "A100-80GB"),
    (r"A100.*40GB", "A100-40GB"),
    (r"H100.*PCIe", "H100-PCIe"),
    (r"H100.*HBM3", "H100-SXM"),
    (r"H200", "H200"),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None for CPUs and whatever is not in the table.

    A device of a TPU v4 or v5p is the whole chip, since its two cores run as one ("megacore").

    >>> chip_of("TPU v5 lite").name, chip_of("NVIDIA H100 80GB HBM3").name, chip_of("cpu")
    ('v5e', 'H100-SXM', None)
    """
    for pattern, name in _KINDS:
        if re.search(pattern, device_kind):
            return CHIPS[name]
    return None
