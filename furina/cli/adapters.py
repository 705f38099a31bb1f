"""Commands on methods and adapter folders: methods, merge, export, combine, assets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rich.table import Column, Table

from furina.assets import ASSETS, fetch, is_cached
from furina.cli.parsing import Command
from furina.cli.shared import WithBackbone, console, require_new
from furina.errors import ConfigurationError

if TYPE_CHECKING:
    from furina.adapters import AdapterConfig


@dataclass(kw_only=True)
class Methods(Command):
    """List the fine-tuning methods: mergeable or not and why, parameters, source."""

    example: ClassVar[str] = "furina methods --json"

    json: bool = False
    """print JSON in place of a table"""

    def run(self) -> None:
        """Print every method: mergeable and why, its parameter counts, where it comes from."""
        from furina.adapters import methods

        facts = [_facts(config) for config in methods().values()]
        if self.json:
            print(json.dumps(facts, indent=2, ensure_ascii=False))
            return
        counts = [Column(name, justify="right") for name in ("trainable", "no router", "active")]
        table = Table("method", "what it is", "mergeable", "parameters of a (d, k) linear", *counts)
        for fact in facts:
            millions = [f"{count / 1e6:.1f} M" for count in fact["llama_2_7b"].values()]
            merges = f"{'yes' if fact['mergeable'] else 'no'}: {fact['reason']}"
            what = f"{fact['summary']}; {fact['source']}"
            table.add_row(fact["name"], what, merges, fact["parameters"], *millions)
        console().print(table)
        print(
            "Counts: Llama-2-7B, seven linears, default options; trainable, without its routers, "
            "and what acts on one token."
        )
        print("Known deviations from released code, and what was not verified:")
        for fact in facts:
            if fact["deviations"]:
                console().print(f"  {fact['name']}: {fact['deviations']}", highlight=False)
        print("Options of a method: furina fit --method NAME --help")


_LLAMA_2_7B = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
    **dict.fromkeys(("gate_proj", "up_proj"), (4096, 11008)),
    "down_proj": (11008, 4096),
}


def _counts(config: AdapterConfig) -> dict[str, int]:
    """Return the parameters of a Llama-2-7B adapted with `config`."""
    sides = {f"layers.{layer}.{name}": s for layer in range(32) for name, s in _LLAMA_2_7B.items()}
    config = config.resolve(list(sides))
    counts = [config.count(d, k, name) for name, (d, k) in sides.items()]
    trainable, router = sum(c.trainable for c in counts), sum(c.router for c in counts)
    return {
        "trainable": trainable,
        "without_router": trainable - router,
        "active": sum(c.active for c in counts),
    }


def _facts(config: type[AdapterConfig]) -> dict[str, Any]:
    mergeable = config().mergeability()
    return {
        "name": config.name,
        "summary": config.summary,
        "mergeable": mergeable.ok,
        "reason": mergeable.reason,
        "parameters": config.parameter_formula,
        "llama_2_7b": _counts(config()),
        "source": config.source,
        "deviations": config.deviations,
        "options": config().to_dict(),
    }


@dataclass(kw_only=True)
class Assets(Command):
    """Fetch the model and the data into a cache (resumable, verified)."""

    example: ClassVar[str] = "furina assets --list"

    names: Sequence[str] = field(metadata={"nargs": "*"})
    """what to fetch; everything but the optional when none is named"""
    list: bool = False
    """only say what there is and what is cached"""
    cache_dir: Path | None = None
    """folder to keep it in; FURINA_CACHE_DIR, else the user's cache folder"""

    def run(self) -> None:
        """Fetch models and data into the cache, or list them."""
        for name in self.names:
            is_cached(name, self.cache_dir)  # before anything is fetched: a name may be misspelt
        if not self.list:
            for name in self.names or [asset.name for asset in ASSETS.values() if asset.default]:
                print(f"{name}: {fetch(name, self.cache_dir)}")
            return
        table = Table(Column("name", no_wrap=True), "kind", "cached", "licence", "what it is")
        for asset in [ASSETS[name] for name in self.names or ASSETS]:
            cached = "yes" if is_cached(asset.name, self.cache_dir) else "no"
            kind = asset.kind if asset.default else f"{asset.kind}, optional"
            table.add_row(asset.name, kind, cached, asset.licence, asset.description)
        console().print(table)


@dataclass(kw_only=True)
class _Writer(WithBackbone):
    """A command that writes a backbone's weights, or an update of them."""

    dtype: Literal["checkpoint", "bfloat16", "float16", "float32"] = "checkpoint"  # type: ignore[assignment]
    """number format of the backbone's weights; checkpoint is the one that they are stored in"""


@dataclass(kw_only=True)
class Merge(_Writer):
    """Merge an adapter into its backbone: a plain Hugging Face folder."""

    example: ClassVar[str] = "furina merge runs/demo/adapter merged"

    adapter_dir: Path
    """adapter folder that fit or furina.save wrote"""
    out_dir: Path
    """new folder to write"""

    def run(self) -> None:
        """Write backbone and adapter as one plain Hugging Face folder, with the tokenizer."""
        self._write("merged")

    def _write(self, form: str) -> None:
        require_new(self.out_dir)
        backbone = self.backbone_of(self.adapter_dir)
        from furina.backbones.load import load_backbone, load_tokenizer
        from furina.kernels.processor import use_cores
        from furina.model.checkpoint import load
        from furina.model.export import export_merged, export_peft

        use_cores()
        model = load(self.adapter_dir, load_backbone(backbone, self.dtype))
        if form == "merged":
            export_merged(model, self.out_dir, load_tokenizer(backbone))
            dtype = str(model.dtype).removeprefix("torch.")
            print(f"{self.out_dir}: a plain Hugging Face folder in {dtype}")
        else:
            rank = export_peft(model, self.out_dir)
            print(f"{self.out_dir}: one PEFT LoRA of rank {rank}")


@dataclass(kw_only=True)
class Export(Merge):
    """Write an adapter as one PEFT LoRA, or merged."""

    example: ClassVar[str] = "furina export --format peft runs/demo/adapter lora"

    format: Literal["peft", "merged"] = "peft"
    """peft: one LoRA for PeftModel.from_pretrained and LoRA servers; merged: a plain model"""

    def run(self) -> None:
        """Write the adapter in the format asked for."""
        self._write(self.format)


@dataclass(kw_only=True)
class Combine(_Writer):
    """Combine adapters of one backbone into one LoRA adapter."""

    example: ClassVar[str] = (
        "furina combine runs/maths/adapter runs/science/adapter both --weights 0.5 0.5"
    )

    adapter_dirs: list[Path]
    """adapter folders that fit or furina.save wrote"""
    out_dir: Path
    """new adapter folder to write"""
    weights: list[float] | None = None
    """one number for each adapter, in their order; equal shares of 1 if not given"""
    method: Literal["linear", "from"] = "linear"
    """linear: the exact weighted sum; from: larger updates weigh more, linear by linear"""
    power: float | None = None
    """from: exponent of an update's Frobenius norm in its weight, 2 if none; 0 is linear"""

    def run(self) -> None:
        """Write several adapters of one backbone as one LoRA adapter folder."""
        folders = self.adapter_dirs
        weights = self.weights or [1 / len(folders)] * len(folders)
        if len(weights) != len(folders):
            raise ConfigurationError(
                f"--weights needs {len(folders)} numbers, one for each adapter, not {len(weights)}."
            )
        if self.power is not None and self.method != "from":
            raise ConfigurationError("--power has no effect without --method from.")
        require_new(self.out_dir)
        backbone = self.backbone_of(*folders)
        from furina.backbones.load import load_backbone
        from furina.kernels.processor import use_cores
        from furina.model.adapter_sets import AdapterSet
        from furina.model.checkpoint import save

        use_cores()
        adapters = AdapterSet(load_backbone(backbone, self.dtype))
        for folder in folders:
            adapters.load(str(folder), folder)
        chosen = dict(zip(adapters.names, weights, strict=True))
        power = {} if self.power is None else {"power": self.power}
        adapters.combine("combined", chosen, self.method, **power)
        adapters.use("combined")
        save(adapters.model, self.out_dir)
        print(f"{self.out_dir}: one LoRA adapter out of {len(folders)}")
