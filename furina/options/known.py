"""Names that transformers and torch know, told without importing them.

A test holds them to the libraries' own.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from importlib.metadata import entry_points

from furina.errors import ConfigurationError, nearest

ATTENTIONS = (
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
    "sdpa",
)
COMPILERS = (
    "aot_eager",
    "aot_eager_decomp_partition",
    "aot_eager_decomp_partition_crossref",
    "aot_eager_decomp_partition_with_mode",
    "aot_eager_default_partitioner",
    "aot_ts",
    "cudagraphs",
    "eager",
    "eager_debug",
    "eager_noexcept",
    "inductor",
    "invoke_subgraph",
    "onnxrt",
    "openxla",
    "openxla_eval",
    "pre_dispatch_eager",
    "tvm",
    "ts",
)


def require_attention(name: str | None) -> None:
    """Refuse what is no attention implementation: of transformers, or a kernel AUTHOR/NAME."""
    if name is not None and "/" not in name:
        _require("attention", name, ATTENTIONS, "transformers")


def require_compiler(name: str | None) -> None:
    """Refuse what is no backend of torch.compile, of its own or of an installed package."""
    if name is not None:
        others = [point.name for point in entry_points(group="torch_dynamo_backends")]
        _require("compile", name, [*COMPILERS, *others], "torch")


def _require(option: str, name: str, known: Collection[str], library: str) -> None:
    """Raise ConfigurationError for an unknown name, unless the library is loaded and tells."""
    if name not in known and library not in sys.modules:
        raise ConfigurationError(
            f"{option}={name!r} is not known to {library}.{nearest(name, known)}"
        )
