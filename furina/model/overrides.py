"""Methods of a Hugging Face model that are replaced while it is adapted."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from furina.adapters import AdapterLinear
from furina.errors import ConfigurationError
from furina.kernels.forward import ForwardTracker


class Override:
    """A method replaced on one model; copies and pickles of the model take it along."""

    name: str

    def __init__(self, model: nn.Module, tracker: ForwardTracker) -> None:
        """Stand in for the method of the model's class, or one that was set on the model."""
        self.model, self.tracker = model, tracker
        self.before = model.__dict__.get(self.name)
        model.__dict__[self.name] = self

    def remove(self) -> None:
        """Give the model its own method back."""
        del self.model.__dict__[self.name]
        if self.before is not None:
            self.model.__dict__[self.name] = self.before

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own method."""
        own = self.before or partial(getattr(type(self.model), self.name), self.model)
        return own(*args, **kwargs)


class Generate(Override):
    """`model.generate`, whose forwards share what the adapter derives from its parameters."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the class does."""
        with self.tracker.keeping():
            return self.own(*args, **kwargs)


class SavePretrained(Override):
    """`model.save_pretrained`, which would write weights that no backbone loads."""

    name = "save_pretrained"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save a merged model, which is a plain one; raise ConfigurationError for another."""
        if any(isinstance(module, AdapterLinear) for module in self.model.modules()):
            raise ConfigurationError(
                "The model has an adapter in it, so from_pretrained could not read what "
                "save_pretrained would write: call furina.save(model, folder) for the adapter, or "
                "furina.export_merged(model, folder) for a model without one. A transformers "
                'Trainer needs save_strategy="no".'
            )
        return self.own(*args, **kwargs)


def override(model: nn.Module, tracker: ForwardTracker) -> list[Override]:
    """Replace those of these methods that `model` has; each result can be removed again."""
    return [
        kind(model, tracker) for kind in (Generate, SavePretrained) if hasattr(model, kind.name)
    ]
