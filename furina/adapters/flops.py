"""How many FLOPs a method adds to a training step of one linear, in closed form.

For T tokens, an adapter on a (d, k) linear, with N experts of rank r, R = N·r, takes

    low-rank          2TR(d+k) forward, 4TR(d+k) backward; likewise any other trained matrix
    DoRA              2dkr + 2(d+k)r² for the norms; with dropout W once more, 4Tdk
    PiSSA             4Tr(d+k) for the start that it subtracts; so does FURINA's start `subtract`
    FlyLoRA           A is frozen: 2Trd less
    SLIM              8TCd for its C clusters
    MixLoRA           in an FFN, B of gate and up and A of down once for each of K experts
    FURINA's norms    forward   2Rrd for A_i A_iᵀ, 2Rrk for the norms d̃_i
                      backward  2Rrk for ∂d̃/∂B, 2Rrk + 2Rrd for ∂d̃/∂A
    its selection     forward   2Rrk for M_i, 2TRw for the activities |Ŵ_i x| from h_i and M_i
                      backward  2Rrk for ∂M/∂B, 2TRw for ∂/∂h, 2TRw for ∂/∂M
                      of E routed experts over T tokens: 2T(1 + 2E) for the sums of the top K's
                      share, of the shares and of the choices, 2T(1 + E) back (choices have no
                      gradient)

w is R while R ≤ `directions.DENSE`, where the products with M_i are one with a block-diagonal
matrix, and r above. Shared experts take part in all but the sums. Only matrix products count: no
elementwise work, not the Cholesky factors (r³/3 for each expert), and not PiSSA's decomposition
before the first step. What depends on no token is done once a step.
"""

from __future__ import annotations

from functools import singledispatch

from furina.adapters.base import AdapterConfig
from furina.adapters.dora import DoRAConfig
from furina.adapters.flylora import FlyLoRAConfig
from furina.adapters.furina import FurinaConfig
from furina.adapters.mixlora import DOWN, MixLoRAConfig
from furina.adapters.pissa import PiSSAConfig
from furina.adapters.slim import SLIMConfig
from furina.kernels.directions import DENSE


@singledispatch
def adapter_flops(
    config: AdapterConfig, tokens: int, in_features: int, out_features: int, name: str = ""
) -> int:
    """Return what the adapter of one linear adds to a step; by default 6 a parameter and token.

    A method with other products registers a function of its own, here or in its file.
    """
    return 6 * tokens * config.count(in_features, out_features, name).trainable


@adapter_flops.register
def _dora(config: DoRAConfig, tokens: int, d: int, k: int, name: str = "") -> int:
    r = config.rank
    norms = 2 * d * k * r + 2 * (d + k) * r**2
    return 6 * tokens * r * (d + k) + norms + (4 * tokens * d * k if config.dropout else 0)


@adapter_flops.register
def _pissa(config: PiSSAConfig, tokens: int, d: int, k: int, name: str = "") -> int:
    return (6 if config.in_place else 10) * tokens * config.rank * (d + k)


@adapter_flops.register
def _flylora(config: FlyLoRAConfig, tokens: int, d: int, k: int, name: str = "") -> int:
    return tokens * config.rank * (4 * d + 6 * k)


@adapter_flops.register
def _slim(config: SLIMConfig, tokens: int, d: int, k: int, name: str = "") -> int:
    follows = config.weight_yielding and config.has_router(name)
    clusters = 8 * tokens * config.num_clusters * d if follows else 0
    return 6 * tokens * config.count(d, k, name).trainable + clusters


@adapter_flops.register
def _mixlora(config: MixLoRAConfig, tokens: int, d: int, k: int, name: str = "") -> int:
    count = config.count(d, k, name)
    if config.num_experts_of(name) == 1 or config.router_removed:
        return 6 * tokens * count.trainable
    a, b = (config.top_k, 1) if name.rpartition(".")[2] == DOWN else (1, config.top_k)
    experts = config.num_experts * config.rank * (a * d + b * k)
    return 6 * tokens * (experts + count.router)


@adapter_flops.register
def _furina(config: FurinaConfig, tokens: int, d: int, k: int, name: str = "") -> int:
    total, r = config.num_experts * config.rank, config.rank
    if not config.num_routed_experts:
        return 6 * tokens * total * (d + k)
    products = (10 if config.start == "subtract" else 6) * tokens * total * (d + k)
    norms = total * r * (2 * d + 2 * k if config.detach_norm else 4 * d + 6 * k)
    selection = _selection(config, tokens, k) if config.has_auxiliary_loss else 0
    return products + norms + selection


def _selection(config: FurinaConfig, tokens: int, k: int) -> int:
    routed, total, r = config.num_routed_experts, config.num_experts * config.rank, config.rank
    sums = tokens * (4 + 6 * routed)
    if config.activity != "l2":  # each expert's output itself
        return 6 * tokens * k * routed * r + sums
    columns = total if total <= DENSE else r
    return 4 * total * r * k + 6 * tokens * total * columns + sums
