"""Backbones whose shape is known without their weights: public config.json files.

README.md beside them says where each was found and what was compared.
"""

from __future__ import annotations

from pathlib import Path

_NAMES = (
    "smollm2-135m-instruct",
    "Qwen/Qwen2-7B",
    "openchat/openchat-3.6-8b-20240522",
    "meta-llama/Llama-3.2-3B",
)
ARCHITECTURES = {
    name: Path(__file__).with_name(f"{name.rpartition('/')[2].lower()}.json") for name in _NAMES
}
"""Each backbone's config.json, by the name that a run config gives it."""
