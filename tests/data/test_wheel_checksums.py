"""A cached wheel of which one bit has flipped gives the same items or none."""

from __future__ import annotations

import random

import pytest

from furina.data.sources import load_items
from furina.errors import DataError


@pytest.mark.parametrize(("task", "split"), [("openbookqa", "test"), ("openbookqa", "validation")])
def test_no_flipped_bit_changes_what_is_read(wheel_cache, task, split):
    good, items = wheel_cache.read_bytes(), load_items(task, split, "wheel")
    refused = 0
    for bit in random.Random(0).sample(range(8 * len(good)), 200):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        wheel_cache.write_bytes(data)
        try:
            assert load_items(task, split, "wheel") == items  # where the bit is not in its files
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 5
