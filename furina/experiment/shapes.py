"""What a run adapts, found on the meta device: no weights, no hub and no memory are needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from furina.adapters import AdapterConfig
from furina.backbones.load import meta_backbone
from furina.errors import ConfigurationError
from furina.experiment.config import RunConfig
from furina.model.inject import adapt, remove
from furina.model.parameters import adapter_parameters, adapter_state_dict
from furina.model.state import state_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Decoder:
    """The sides of a Llama-like decoder.

    Attributes:
        parameters: of the whole model, a tied output embedding counted once.
        layers: decoder layers.
        hidden: width of the residual stream.
        heads: attention heads.
        queries: width of q, which is that of attention's output.
        keys: width of k, and of v.
        ffn: width inside the feed-forward network.
        vocabulary: rows of the output embedding.
        attention: transformers' implementation that the model chooses by itself.
    """

    parameters: int
    layers: int
    hidden: int
    heads: int
    queries: int
    keys: int
    ffn: int
    vocabulary: int
    attention: str

    @property
    def layer_weights(self) -> int:
        """Entries of a layer's seven matrices."""
        attention = self.hidden * 2 * (self.queries + self.keys)
        return attention + 3 * self.hidden * self.ffn

    @property
    def cached(self) -> int:
        """Entries of the keys and values of one token."""
        return 2 * self.layers * self.keys


class Linear(NamedTuple):
    """An adapted linear."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Adapted:
    """What a method puts into a backbone.

    Attributes:
        config: its options, made definite for this backbone.
        linears: what its targets match.
        trainable: parameters that learn.
        kept: numbers beside them that do not.
        by_formula: whether they were counted in closed form, since it cannot be built without
            weights.
    """

    config: AdapterConfig
    linears: tuple[Linear, ...]
    trainable: int
    kept: int
    by_formula: bool = False


def decoder_of(backbone: str) -> Decoder:
    """Return a backbone's sides; raises ConfigurationError where they are not at hand."""
    model = _model(backbone)
    return decoder(model.config, sum(parameter.numel() for parameter in model.parameters()))


def decoder(config: PreTrainedConfig, parameters: int) -> Decoder:
    """Return the sides that a model's config says.

    Raises ConfigurationError for one that is no Llama-like decoder.
    """
    text = config.get_text_config(decoder=True)
    try:
        hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
        width = int(getattr(text, "head_dim", None) or hidden // heads)
        return Decoder(
            parameters=parameters,
            layers=int(text.num_hidden_layers),
            hidden=hidden,
            heads=heads,
            queries=heads * width,
            keys=int(getattr(text, "num_key_value_heads", None) or heads) * width,
            ffn=int(text.intermediate_size),
            vocabulary=int(text.vocab_size),
            attention=str(text._attn_implementation),
        )
    except AttributeError as error:
        raise ConfigurationError(
            f"A backbone of type {config.model_type} cannot be planned for, since its config has "
            f"no {error.name}: plans are for decoders like Llama's."
        ) from error


def adapted_of(config: RunConfig) -> Adapted | None:
    """Return what a run adapts, None for the untouched backbone.

    Raises ConfigurationError where its method, options or targets do not fit the backbone.
    """
    if config.is_base:
        return None
    options = json.dumps(config.adapter, sort_keys=True)
    return _adapted(config.backbone, config.method, options, config.targets)


@cache
def _model(backbone: str) -> PreTrainedModel:
    return meta_backbone(backbone)


@cache
def _adapted(backbone: str, method: str, options: str, targets: tuple[str, ...] | None) -> Adapted:
    config = RunConfig(method=method, adapter=json.loads(options)).adapter_config()
    assert config is not None
    model = _model(backbone)
    try:
        adapt(model, config, targets=targets, seed=0)
    except (NotImplementedError, RuntimeError):  # it wants to see weights
        return _by_formula(model, config, targets)
    try:
        return adapted(model)
    finally:
        remove(model)


def adapted(model: PreTrainedModel) -> Adapted:
    """Return what has been put into a model."""
    trainable = sum(tensor.numel() for tensor in adapter_parameters(model).values())
    every = sum(tensor.numel() for tensor in adapter_state_dict(model).values())
    return Adapted(state_of(model).config, _linears(model), trainable, every - trainable)


def _by_formula(
    model: PreTrainedModel, config: AdapterConfig, targets: tuple[str, ...] | None
) -> Adapted:
    adapt(model, "lora", targets=targets, seed=0, rank=1)  # only to see what the targets match
    linears = _linears(model)
    remove(model)
    config = config.resolve([linear.name for linear in linears])
    counts = [config.count(d, k, name).trainable for name, d, k in linears]
    return Adapted(config, linears, sum(counts), kept=0, by_formula=True)


def _linears(model: PreTrainedModel) -> tuple[Linear, ...]:
    return tuple(
        Linear(name, layer.base.in_features, layer.base.out_features)
        for name, layer in state_of(model).layers.items()
    )
