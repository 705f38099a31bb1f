"""What scaling.py measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Report = dict[str, Any]
SWEEPS = ("experts", "rank", "tokens", "width", "shapes")
TOTAL_RANK, EXPERTS, RANK = 128, 8, 16
LAYERS = 28
"""Both backbones have as many."""


@dataclass(frozen=True)
class Backbone:
    """The sides of a Llama-like block."""

    hidden: int
    keys: int
    ffn: int

    def shapes(self, divisor: int) -> dict[tuple[str, ...], tuple[int, int]]:
        """Return (in, out) of the seven linears, those of one shape together."""
        hidden, keys, ffn = (side // divisor for side in (self.hidden, self.keys, self.ffn))
        return {
            ("q", "o"): (hidden, hidden),  # the heads together are as wide as the hidden state
            ("k", "v"): (hidden, keys),
            ("gate", "up"): (hidden, ffn),
            ("down",): (ffn, hidden),
        }


BACKBONES = {
    "Llama-3.2-3B": Backbone(hidden=24 * 128, keys=8 * 128, ffn=8192),
    "Qwen2-7B": Backbone(hidden=28 * 128, keys=4 * 128, ffn=18944),
}


@dataclass(frozen=True)
class Sizes:
    """What is swept, and what stays fixed meanwhile."""

    experts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    tokens: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    widths: tuple[int, ...] = (512, 1024, 2048, 4096)
    fixed_tokens: int = 1024
    fixed_width: int = 2048
    divisor: int = 1
    """Of the sides of real backbones."""


# Total ranks on both sides of DENSE, and numbers of experts with and without a selection loss.
QUICK = Sizes((1, 2, 32), (4, 64), (16, 32), (32, 64), 32, 64, 64)


@dataclass(frozen=True)
class Point:
    """One linear to measure; `value` is its place in the series."""

    series: str
    value: int | str
    tokens: int
    in_features: int
    out_features: int
    num_experts: int = EXPERTS
    rank: int = RANK
    backbone: str = ""
    linears: tuple[str, ...] = ()

    @property
    def num_shared(self) -> int:
        """Return FURINA's default of one, but leave a single expert to route itself."""
        return min(1, self.num_experts - 1)


def points_of(sweep: str, sizes: Sizes) -> Iterator[Point]:
    """Yield the points of one sweep, in order."""
    tokens, width = sizes.fixed_tokens, sizes.fixed_width
    square = tokens, width, width
    if sweep == "experts":
        for n in sizes.experts:
            yield Point(f"experts, total rank {TOTAL_RANK}", n, *square, n, TOTAL_RANK // n)
        for n in sizes.experts:
            yield Point(f"experts of rank {RANK}", n, *square, n)
    elif sweep == "rank":
        yield from (Point("rank of an expert", r, *square, rank=r) for r in sizes.ranks)
    elif sweep == "tokens":
        yield from (Point("tokens", t, t, width, width) for t in sizes.tokens)
    elif sweep == "width":
        yield from (Point("width", side, tokens, side, side) for side in sizes.widths)
    else:
        for name, backbone in BACKBONES.items():
            for linears, sides in backbone.shapes(sizes.divisor).items():
                value = f"{name.rpartition('-')[2]} {', '.join(linears)}"
                yield Point(
                    "linear of a backbone", value, tokens, *sides, backbone=name, linears=linears
                )


def backbone_costs(points: Sequence[Report]) -> list[Report]:
    """Return what a step costs in all adapted linears of each measured backbone, by variant.

    `added_*` is the share of the frozen linears' cost that comes on top of it.
    """
    return [
        _backbone_cost(name, own)
        for name in BACKBONES
        if (own := [point for point in points if point["backbone"] == name])
    ]


def _backbone_cost(name: str, points: list[Report]) -> Report:
    totals = {
        variant: {
            key: LAYERS * sum(len(p["linears"]) * p["variants"][variant][key] for p in points)
            for key in ("flops", "seconds")
        }
        for variant in points[0]["variants"]
    }
    for total in totals.values():
        shares = {f"added_{key}": total[key] / totals["frozen"][key] - 1 for key in total}
        total.update(shares)
    tokens = points[0]["tokens"]
    return {"backbone": name, "layers": LAYERS, "tokens": tokens, "variants": totals}
