"""moe_peft's methods, each in a process of its own environment, to step or to generate with."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from training_variants import LEARNING_RATE, Batch

import furina
from furina.assets import ASSETS, locate
from furina.assets.convert import quiet_transformers
from furina.backbones.tiny import TINY
from furina.errors import FurinaError
from furina.model.inject import DEFAULT_TARGETS

WORKER = Path(__file__).with_name("moe_peft_worker.py")
ENVIRONMENT = Path(__file__).parents[1] / ".venv-moe-peft"
MOE_PEFT = ("moe_peft_lora", "moe_peft_mixlora", "moe_peft_mola", "moe_peft_loramoe")
CHECKPOINTS = {"as_shipped": "recompute", "kept": "none"}
"""What its loops do about activations: its trainer's own choice, and the quicker one."""
TOP_K = 2


class PeerError(FurinaError):
    """A peer cannot run, for the reason given."""


class Peer:
    """One method of moe_peft on the batch; has what a `Variant` has."""

    def __init__(self, name: str, batch: Batch, options: Any) -> None:
        """Start the worker of a variant such as kept/moe_peft_mixlora.

        Raises PeerError if its environment or the method does not work.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="moe-peft-")
        self._process: subprocess.Popen[str] | None = None
        try:
            legacy_folder(options.backbone, Path(self._folder.name))
            self._process = start(options.moe_peft)
            built = self._ask(json.dumps(self._setup(name, batch, options)))
        except BaseException:
            self.close()
            raise
        self.trainable: int = built["trainable"]
        self.versions: dict[str, str] = built["versions"]

    def _setup(self, name: str, batch: Batch, options: Any) -> dict[str, Any]:
        loop, _, peer = name.partition("/")
        method = peer.rpartition("_")[2]
        rank = options.rank if method == "lora" else options.rank // options.experts
        return {
            "folder": self._folder.name,
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

    def seconds(self) -> float:
        """Do one step; return how long it took."""
        (seconds,) = self._ask("step 1")
        return seconds

    @property
    def loss(self) -> float:
        """The last step's loss."""
        return self._ask("loss")

    def memory(self, steps: int) -> int:
        """Return the bytes that the first steps need beside the model."""
        return self._ask(f"memory {steps}")

    def generate(self, prompt: list[list[int]], new_tokens: int) -> list[float]:
        """Return the seconds of each token that follows the prompts."""
        return self._ask("generate " + json.dumps([prompt, new_tokens], separators=(",", ":")))

    def _ask(self, line: str) -> Any:
        assert self._process and self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise PeerError(f"moe_peft's process ended with status {self._process.wait()}")
        value = json.loads(answer)
        if isinstance(value, dict) and "error" in value:
            raise PeerError(value["error"])
        return value

    def close(self) -> None:
        """End the worker, which stops where its input does."""
        if self._process:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
        self._folder.cleanup()


def start(environment: Path) -> subprocess.Popen[str]:
    """Start the worker with the interpreter of `environment`."""
    python = Path(environment) / "bin" / "python"
    if not python.exists():
        raise PeerError("moe_peft is not installed: run `make moe-peft`")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(python), "-W", "ignore", str(WORKER)], **pipes)


def legacy_folder(backbone: str, folder: Path) -> None:
    """Fill `folder` with the backbone as transformers 4 reads it: links, and a config in its words.

    Raises PeerError for a name on the hub, which has no folder yet.
    """
    if backbone in TINY:
        source = folder / "saved"
        with quiet_transformers(errors_only=False):
            furina.load_backbone(backbone).save_pretrained(source)
    else:
        source = locate(backbone) if backbone in ASSETS else Path(backbone).expanduser()
    if not (source / "config.json").is_file():
        raise PeerError(f"{backbone} is no folder: give moe_peft an asset or a local folder")
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
