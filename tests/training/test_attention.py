"""Short rows are trained with eager attention on a CPU, and nothing else is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from furina.training.attention import EAGER_UP_TO, training_attention
from tests.helpers import Chain, tiny_llama, tokens


def implementation(model: Any) -> str:
    return str(model.config._attn_implementation)


def test_short_rows_are_trained_with_eager_attention_and_scored_with_the_own_one() -> None:
    model = tiny_llama()
    assert implementation(model) == "sdpa"
    with torch.no_grad():
        own = model(**tokens()).logits
        with training_attention(model, EAGER_UP_TO):
            assert implementation(model) == "eager"
            eager = model(**tokens()).logits
    assert implementation(model) == "sdpa"
    real = tokens()["attention_mask"].bool()
    torch.testing.assert_close(eager[real], own[real])


def test_it_is_put_back_after_an_error() -> None:
    model = tiny_llama()
    with pytest.raises(KeyError), training_attention(model, 1):
        raise KeyError
    assert implementation(model) == "sdpa"


def test_long_rows_keep_their_attention() -> None:
    model = tiny_llama()
    with training_attention(model, EAGER_UP_TO + 1):
        assert implementation(model) == "sdpa"


def test_models_on_other_devices_or_without_a_choice_are_left_alone() -> None:
    model = tiny_llama().to("meta")
    with training_attention(model, 1):
        assert implementation(model) == "sdpa"
    with training_attention(Chain(), 1):
        pass
