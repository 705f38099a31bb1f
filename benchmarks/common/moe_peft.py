"""moe_peft's methods, each in a process of its own environment, to step or to generate with."""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from torch import Tensor

import furina
from benchmarks.common.models import LEARNING_RATE
from benchmarks.common.worker import ROOT, Worker, WorkerError
from furina.assets import ASSETS, locate
from furina.assets.convert import quiet_transformers
from furina.backbones.tiny import TINY
from furina.data.batches import Batch
from furina.evaluation.latency import Timing
from furina.model.inject import DEFAULT_TARGETS

WORKER = Path(__file__).with_name("moe_peft_worker.py")
ENVIRONMENT = ROOT / ".venv-moe-peft"
PEERS = ("moe_peft_lora", "moe_peft_mixlora", "moe_peft_mola", "moe_peft_loramoe")
CHECKPOINTS = {"as_shipped": "recompute", "kept": "none"}
"""What its loops do about activations: its trainer's own choice, and the quicker one."""
TOP_K = 2


class Peer(Worker):
    """One method of moe_peft on the batch: a `Variant` of training, and a `Timer` of latency."""

    def __init__(self, name: str, batch: Batch, options: Namespace) -> None:
        """Start the worker of a variant such as kept/moe_peft_mixlora.

        Raises WorkerError if its environment or the method does not work.
        """
        loop, _, peer = name.partition("/")
        method = peer.rpartition("_")[2]
        rank = options.rank if method == "lora" else options.rank // options.experts
        with tempfile.TemporaryDirectory(prefix="moe-peft-") as folder:
            legacy_folder(options.backbone, Path(folder))
            setup: dict[str, Any] = {
                "folder": folder,
                "method": method,
                "rank": rank,
                "alpha": 2 * rank,
                "experts": options.experts,
                "top_k": TOP_K,
                "dropout": options.dropout,
                "targets": list(DEFAULT_TARGETS),
                "learning_rate": LEARNING_RATE,
                "checkpoint": CHECKPOINTS[loop],
                **{key: getattr(options, key) for key in ("dtype", "device", "threads", "seed")},
                **{key: tensor.tolist() for key, tensor in batch.items()},
            }
            super().__init__("moe_peft", options.moe_peft, WORKER, setup)
        self.trainable: int = self.loaded["trainable"]

    def step(self) -> tuple[float, float]:
        """Do one step; return its seconds and its loss."""
        seconds, loss = self.ask("step")
        return seconds, loss

    def memory(self, steps: int) -> int:
        """Return the bytes that the first steps need beside the model."""
        return int(self.ask("memory", steps))

    def __call__(self, prompt: Tensor, new_tokens: int) -> Timing:
        """Generate so many tokens after a prompt (batch, P); return how long it took."""
        return Timing.of_steps(self.ask("generate", prompt.tolist(), new_tokens))


def legacy_folder(backbone: str, folder: Path) -> None:
    """Fill `folder` with the backbone as transformers 4 reads it: links, and a config in its words.

    Raises WorkerError for a name on the hub, which has no folder yet.
    """
    if backbone in TINY:
        source = folder / "saved"
        with quiet_transformers(errors_only=False):
            furina.load_backbone(backbone).save_pretrained(source)
    else:
        source = locate(backbone) if backbone in ASSETS else Path(backbone).expanduser()
    if not (source / "config.json").is_file():
        raise WorkerError(f"{backbone} is no folder: give moe_peft an asset or a local folder")
    config = legacy_config(json.loads((source / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    for file in source.glob("*.safetensors*"):
        (folder / file.name).symlink_to(file.resolve())


def legacy_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json of transformers 5 in the words of transformers 4."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters", None) or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    return config
