"""How fast a device is: a GPU by its data sheet, the CPU by what was timed on one.

Peaks are dense, in bf16 with sums in fp32; memory is in units of 10⁹ bytes, as data sheets have it,
which is some percent less than the card has. Of a peak a training step reaches a part: 0.4 is usual
for models of some billion parameters without fused kernels.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from furina.backbones import DTYPES
from furina.errors import ConfigurationError, nearest
from furina.experiment.config import RunConfig
from furina.experiment.flops import step_flops
from furina.experiment.shapes import adapted_of, decoder_of

T = TypeVar("T")
UTILISATION = 0.4
STEP = Path("results/training/step.json")
"""Where benchmarks/training.py leaves what a step took."""
ANSWER_TOKENS = 8
"""Tokens of a row that it trains on."""
LATENCY = Path("results/latency/latency.json")
"""Where benchmarks/latency.py leaves what a written token took."""
CPU_FLOPS, CPU_MEMORY, CPU_CORES = 2.6e11, 25_325_268_992, 2
CPU_BANDWIDTH = 1.1e10
"""FLOP/s, bytes, cores and bytes/s where those files are missing: what they said when made last, by

    python benchmarks/training.py --rounds 5 --results results/training
    python benchmarks/latency.py --results results/latency
"""


@dataclass(frozen=True)
class Device:
    """A device to plan for.

    Attributes:
        name: what it is chosen by.
        title: what it is called in a table.
        peak: FLOP/s.
        memory: bytes.
        bandwidth: bytes of its memory that it reads in a second; None if unknown.
        utilisation: part of peak and bandwidth that a run reaches.
    """

    name: str
    title: str
    peak: float
    memory: int
    bandwidth: float | None = None
    utilisation: float = UTILISATION

    def hours(self, flops: float) -> float:
        """Return how long so much arithmetic takes."""
        return flops / (self.peak * self.utilisation) / 3600

    def reading_hours(self, size: float) -> float:
        """Return how long it takes to read so many bytes, which bounds writing token by token."""
        return 0.0 if self.bandwidth is None else size / (self.bandwidth * self.utilisation) / 3600


GPUS = {
    device.name: device
    for device in (
        # NVIDIA's data sheets, without sparsity; H100 and H200 are the SXM cards.
        Device("a100-80gb", "A100 80 GB", 312e12, 80 * 10**9, 2039e9),
        Device("h100-80gb", "H100 80 GB", 989.4e12, 80 * 10**9, 3350e9),
        Device("h200", "H200", 989.4e12, 141 * 10**9, 4800e9),
        Device("rtx-4090", "RTX 4090", 165.2e12, 24 * 10**9, 1008e9),
        Device("l40s", "L40S", 362.05e12, 48 * 10**9, 864e9),
    )
}


def device(name: str, step: Path = STEP, latency: Path = LATENCY) -> Device:
    """Return the device called `name`, for "cpu" the one that `step` and `latency` were timed on.

    Raises ConfigurationError for an unknown name, with the nearest right one.
    """
    if name == "cpu":
        return _cpu(step, latency)
    if name not in GPUS:
        known = nearest(name, [*GPUS, "cpu"])
        raise ConfigurationError(f"There is no device {name!r} to plan for.{known}")
    return GPUS[name]


def _cpu(step: Path, latency: Path) -> Device:
    flops, memory, cores = CPU_FLOPS, CPU_MEMORY, CPU_CORES
    if step.is_file():
        flops, memory, cores = _timed(step, _training, "a LoRA step", "training")
    bandwidth = CPU_BANDWIDTH
    if latency.is_file():
        bandwidth = _timed(latency, _writing, "a token of the backbone", "latency")
    return Device("cpu", f"{cores} CPU cores", flops, memory, bandwidth, utilisation=1.0)


def _timed(path: Path, read: Callable[[Mapping[str, Any]], T], what: str, by: str) -> T:
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{path} does not say what {what} took on a CPU: make it again with "
            f"benchmarks/{by}.py, or remove it."
        ) from error


def _training(report: Mapping[str, Any]) -> tuple[float, int, int]:
    """Return FLOP/s, bytes and cores of the LoRA step that benchmarks/training.py timed."""
    settings, hardware = report["settings"], report["environment"]["hardware"]
    rows, length = settings["rows"], settings["tokens"]
    config = RunConfig(
        backbone=settings["backbone"], method="lora", adapter={"rank": settings["rank"]}
    )
    found = adapted_of(config)
    assert found is not None
    decoder, answers = decoder_of(config.backbone), rows * ANSWER_TOKENS
    flops = step_flops(decoder, found, rows * length, length, answers)
    seconds = float(report["seconds"]["lora"]["median"])
    return flops / seconds, hardware["memory_bytes"], hardware["cores"]


def _writing(report: Mapping[str, Any]) -> float:
    """Return the bytes/s at which benchmarks/latency.py's backbone read its weights for a token."""
    settings, cell = report["settings"], report["cells"][0]
    weights = decoder_of(settings["backbone"]).parameters * DTYPES[settings["dtype"]].itemsize
    times = [float(each["per_token_ms"]) for each in cell["rounds"]["base"]]
    return weights / statistics.median(times) * 1000
