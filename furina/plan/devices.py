"""How fast a device is: a GPU by its data sheet, this machine's CPU by a probe.

Peaks are dense, in bf16 with sums in fp32; memory is in units of 10⁹ bytes, as data sheets have it,
which is some percent less than the card has. Of a peak a training step reaches a part: 0.4 is usual
for models of some billion parameters without fused kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from furina.errors import ConfigurationError, nearest
from furina.experiment.config import RunConfig
from furina.records.environment import memory_bytes

if TYPE_CHECKING:
    from furina.plan.speed import Speed

CPU = "cpu"
UTILISATION = 0.4


@dataclass(frozen=True)
class Device:
    """A device to plan for.

    Attributes:
        name: what it is chosen by.
        title: what it is called in a table.
        memory: bytes.
        peak: FLOP/s, of which a run reaches `UTILISATION`; None for this machine, which is timed.
        bandwidth: bytes of its memory that it reads in a second, likewise.
    """

    name: str
    title: str
    memory: int
    peak: float | None = None
    bandwidth: float | None = None

    def resolved(self, config: RunConfig) -> RunConfig:
        """Return the run with the dtype that "auto" stands for there: the GPUs are native."""
        if self.name == CPU:
            return config.resolved(CPU)
        return config.updated({"dtype": "bfloat16"}) if config.dtype == "auto" else config

    def speed(self, config: RunConfig, tokens: float | None = None) -> Speed:
        """Return the FLOP/s that a run reaches with micro-batches of so many tokens."""
        from furina.plan import speed

        if self.peak is None:
            return speed.of_run(config, tokens or speed.TOKENS)
        reached = UTILISATION * self.peak
        return speed.Speed(reached, reached, reached)

    def reading(self, config: RunConfig) -> float:
        """Return the bytes/s at which a run reads, which bounds writing token by token."""
        from furina.plan import speed

        if self.bandwidth is None:
            return speed.bandwidth(config.dtype)
        return UTILISATION * self.bandwidth


GPUS = {
    device.name: device
    for device in (
        # NVIDIA's data sheets, without sparsity; H100 and H200 are the SXM cards.
        Device("a100-80gb", "A100 80 GB", 80 * 10**9, 312e12, 2039e9),
        Device("h100-80gb", "H100 80 GB", 80 * 10**9, 989.4e12, 3350e9),
        Device("h200", "H200", 141 * 10**9, 989.4e12, 4800e9),
        Device("rtx-4090", "RTX 4090", 24 * 10**9, 165.2e12, 1008e9),
        Device("l40s", "L40S", 48 * 10**9, 362.05e12, 864e9),
    )
}


def device(name: str) -> Device:
    """Return the device called `name`, for "cpu" this machine's.

    Raises ConfigurationError for an unknown name, with the nearest right one.
    """
    if name == CPU:
        from furina.kernels.processor import cores

        return Device(CPU, f"{cores()} CPU cores", memory_bytes())
    if name not in GPUS:
        known = nearest(name, [*GPUS, CPU])
        raise ConfigurationError(f"There is no device {name!r} to plan for.{known}")
    return GPUS[name]
