"""Commands on methods and adapter folders: methods, merge, export, combine, assets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.table import Column, Table

from furina.cli.shared import (
    add_backbone,
    backbone_of,
    console,
    require_adapter,
    require_backbone,
    require_new,
)
from furina.errors import ConfigurationError

if TYPE_CHECKING:
    from furina.adapters import AdapterConfig


def methods_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of `furina methods`."""
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def methods(options: Namespace) -> None:
    """Print every method: mergeable and why, its parameter counts, where it comes from."""
    from furina.adapters import methods as registered

    facts = [_facts(config) for config in registered().values()]
    if options.json:
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
        "Counts: Llama-2-7B, seven linears, default options; trainable, without its routers, and "
        "what acts on one token."
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


def assets_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of `furina assets`."""
    parser.add_argument(
        "names",
        nargs="*",
        type=str,
        help="what to fetch; everything but the optional when none is named",
    )
    parser.add_argument(
        "--list", action="store_true", help="only say what there is and what is cached"
    )
    parser.add_argument(
        "--cache-dir",
        type=Path | None,
        default=None,
        help="folder to keep it in; FURINA_CACHE_DIR, else the user's cache folder",
    )


def assets(options: Namespace) -> None:
    """Fetch models and data into the cache, or list them."""
    from furina.assets import ASSETS, fetch, is_cached

    for name in options.names:
        is_cached(name, options.cache_dir)  # before anything is fetched: a name may be misspelt
    if not options.list:
        for name in options.names or [asset.name for asset in ASSETS.values() if asset.default]:
            print(f"{name}: {fetch(name, options.cache_dir)}")
        return
    table = Table(Column("name", no_wrap=True), "kind", "cached", "licence", "what it is")
    for asset in [ASSETS[name] for name in options.names or ASSETS]:
        cached = "yes" if is_cached(asset.name, options.cache_dir) else "no"
        kind = asset.kind if asset.default else f"{asset.kind}, optional"
        table.add_row(asset.name, kind, cached, asset.licence, asset.description)
    console().print(table)


def _add_folders(parser: ArgumentParser) -> None:
    parser.add_argument(
        "adapter_dir", type=Path, help="adapter folder that fit or furina.save wrote"
    )
    parser.add_argument("out_dir", type=Path, help="new folder to write")
    add_backbone(parser, writes=True)


def merge_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of `furina merge`."""
    _add_folders(parser)


def merge(options: Namespace) -> None:
    """Write backbone and adapter as one plain Hugging Face folder, with the tokenizer."""
    _export(options, "merged")


def export_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of `furina export`."""
    parser.add_argument(
        "--format",
        type=Literal["peft", "merged"],
        default="peft",
        help="peft: one LoRA for PeftModel.from_pretrained and LoRA servers; merged: a plain model",
    )
    _add_folders(parser)


def export(options: Namespace) -> None:
    """Write the adapter in the format asked for."""
    _export(options, options.format)


def _export(options: Namespace, form: str) -> None:
    require_adapter(options.adapter_dir)
    require_new(options.out_dir)
    require_backbone(options.backbone)
    backbone = backbone_of(options.backbone, options.adapter_dir)
    from furina.backbones.load import load_backbone, load_tokenizer
    from furina.kernels.processor import use_cores
    from furina.model.checkpoint import load
    from furina.model.export import export_merged, export_peft

    use_cores()
    model = load(options.adapter_dir, load_backbone(backbone, options.dtype))
    if form == "merged":
        export_merged(model, options.out_dir, load_tokenizer(backbone))
        dtype = str(model.dtype).removeprefix("torch.")
        print(f"{options.out_dir}: a plain Hugging Face folder in {dtype}")
    else:
        rank = export_peft(model, options.out_dir)
        print(f"{options.out_dir}: one PEFT LoRA of rank {rank}")


def combine_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of `furina combine`."""
    parser.add_argument(
        "adapter_dirs", nargs="+", type=Path, help="adapter folders that fit or furina.save wrote"
    )
    parser.add_argument("out_dir", type=Path, help="new adapter folder to write")
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        default=None,
        help="one number for each adapter, in their order; equal shares of 1 if not given",
    )
    parser.add_argument(
        "--method",
        type=Literal["linear", "from"],
        default="linear",
        help="linear: the exact weighted sum; from: larger updates weigh more, linear by linear",
    )
    parser.add_argument(
        "--power",
        type=float | None,
        default=None,
        help="from: exponent of an update's Frobenius norm in its weight, 2 if none; 0 is linear",
    )
    add_backbone(parser, writes=True)


def combine(options: Namespace) -> None:
    """Write several adapters of one backbone as one LoRA adapter folder."""
    folders: list[Path] = options.adapter_dirs
    weights = options.weights or [1 / len(folders)] * len(folders)
    if len(weights) != len(folders):
        raise ConfigurationError(
            f"--weights needs {len(folders)} numbers, one for each adapter, not {len(weights)}."
        )
    if options.power is not None and options.method != "from":
        raise ConfigurationError("--power has no effect without --method from.")
    for folder in folders:
        require_adapter(folder)
    require_new(options.out_dir)
    require_backbone(options.backbone)
    backbone = backbone_of(options.backbone, *folders)
    from furina.backbones.load import load_backbone
    from furina.kernels.processor import use_cores
    from furina.model.adapter_sets import AdapterSet
    from furina.model.checkpoint import save

    use_cores()
    adapters = AdapterSet(load_backbone(backbone, options.dtype))
    for folder in folders:
        adapters.load(str(folder), folder)
    chosen = dict(zip(adapters.names, weights, strict=True))
    power = {} if options.power is None else {"power": options.power}
    adapters.combine("combined", chosen, options.method, **power)
    adapters.use("combined")
    save(adapters.model, options.out_dir)
    print(f"{options.out_dir}: one LoRA adapter out of {len(folders)}")
