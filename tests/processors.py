"""Run the numeric tests as three kinds of processor would: `make test-processors`.

    python -m tests.processors [pytest's arguments]

PyTorch, oneDNN and MKL are told to use no more than the instructions of a level. The level is made
sure of in a process of its own; one that this processor cannot show is a failure, not a skip.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field

ROOMS = "adapters analysis backbones benchmarks evaluation kernels model plan training"
NUMERIC = [
    *(f"tests/{room}" for room in ROOMS.split()),
    "tests/experiment/test_several_devices.py",
    "tests/test_real_model.py",
    "tests/test_reference.py",
]
ASK = "import torch; print(torch.backends.cpu.get_cpu_capability())"


@dataclass(frozen=True)
class Level:
    """What a process is told, and what PyTorch must then call the processor; "" for anything."""

    name: str
    capability: str = ""
    settings: dict[str, str] = field(default_factory=dict)


LEVELS = [
    Level("native"),
    Level(
        "avx2",
        "AVX2",
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        },
    ),
    Level(
        "old",
        "DEFAULT",
        {
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_CBWR": "COMPATIBLE",
        },
    ),
]


def fault(level: Level, arguments: list[str]) -> str | None:
    """Run the tests at `level`; return what is wrong there, None if nothing is."""
    told = {name for each in LEVELS for name in each.settings}
    plain = {name: value for name, value in os.environ.items() if name not in told}
    environment = {**plain, **level.settings, "OMP_NUM_THREADS": "1"}
    asked = subprocess.run([sys.executable, "-c", ASK], env=environment, stdout=subprocess.PIPE)
    found = asked.stdout.decode().strip()
    print(f"\n== {level.name}: PyTorch calls this processor {found} ==", flush=True)
    if level.capability not in ("", found):
        return f"{level.name} (PyTorch calls this processor {found} and not {level.capability})"
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "auto",
        "--dist",
        "worksteal",
        *NUMERIC,
        *arguments,
    ]
    return level.name if subprocess.run(tests, env=environment).returncode else None


def main(arguments: list[str]) -> None:
    """Run every level, and end with an error that names those that failed."""
    faults = [wrong for level in LEVELS if (wrong := fault(level, arguments)) is not None]
    if faults:
        sys.exit(f"error: the numeric tests failed at level {', '.join(faults)}")
    print("The numeric tests pass at every level.")


if __name__ == "__main__":
    main(sys.argv[1:])
