"""Commands on methods and adapter folders: methods, merge, export, assets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Column, Table

from furina.cli.shared import add_backbone, require_new

if TYPE_CHECKING:
    from furina.adapters import AdapterConfig


def methods_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of `furina methods`."""
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def methods(options: Namespace) -> None:
    """Print every method: mergeable and why, its parameter count, where it comes from."""
    from furina.adapters import methods as registered

    configs = registered()
    if options.json:
        print(
            json.dumps(
                [_facts(config) for config in configs.values()], indent=2, ensure_ascii=False
            )
        )
        return
    table = Table("method", "what it is", "mergeable", "parameters of a (d, k) linear")
    for name, config in configs.items():
        mergeable = config().mergeability()
        merges = f"{'yes' if mergeable.ok else 'no'}: {mergeable.reason}"
        table.add_row(name, f"{config.summary}; {config.source}", merges, config.parameter_formula)
    Console().print(table)
    print("Options of a method: furina fit --method NAME --help")


def _facts(config: type[AdapterConfig]) -> dict[str, object]:
    mergeable = config().mergeability()
    return {
        "name": config.name,
        "summary": config.summary,
        "mergeable": mergeable.ok,
        "reason": mergeable.reason,
        "parameters": config.parameter_formula,
        "source": config.source,
        "options": config().to_dict(),
    }


def assets_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of `furina assets`."""
    parser.add_argument(
        "names", nargs="*", type=str, help="what to fetch; everything when none is named"
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

    if not options.list:
        for name in options.names or ASSETS:
            print(f"{name}: {fetch(name, options.cache_dir)}")
        return
    table = Table(Column("name", no_wrap=True), "kind", "cached", "licence", "what it is")
    for asset in ASSETS.values():
        cached = "yes" if is_cached(asset.name, options.cache_dir) else "no"
        table.add_row(asset.name, asset.kind, cached, asset.licence, asset.description)
    Console().print(table)


def _add_folders(parser: ArgumentParser) -> None:
    parser.add_argument(
        "adapter_dir", type=Path, help="adapter folder that fit or furina.save wrote"
    )
    parser.add_argument("out_dir", type=Path, help="new folder to write")
    add_backbone(parser)


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
    from furina.checkpoint import load, read_adapter_config

    read_adapter_config(options.adapter_dir)
    require_new(options.out_dir)
    from furina.backbones import load_backbone, load_tokenizer
    from furina.export import export_merged, export_peft

    model = load(options.adapter_dir, load_backbone(options.backbone, options.dtype))
    if form == "merged":
        export_merged(model, options.out_dir, load_tokenizer(options.backbone))
        print(f"{options.out_dir}: a plain Hugging Face folder")
    else:
        rank = export_peft(model, options.out_dir)
        print(f"{options.out_dir}: one PEFT LoRA of rank {rank}")
