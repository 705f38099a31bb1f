"""What "auto" stands for follows what the device multiplies fast, and is decided once."""

from __future__ import annotations

import logging
import os

import joblib
import pytest
import torch
from torch.nn import functional

from furina.kernels import processor
from furina.kernels.processor import AUTO, native_bfloat16, resolve_dtype, use_cores
from furina.records import provenance


@pytest.fixture(autouse=True)
def _undecided():
    """Let each test decide anew, and those after it."""
    caches = processor.automatic, processor._say, native_bfloat16
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def takes(monkeypatch: pytest.MonkeyPatch, bfloat16: float, float32: float) -> list[str]:
    """Make products take so many seconds; returns the devices that are asked, as they are."""
    asked: list[str] = []

    def seconds(kind, dtypes):
        asked.append(kind)
        return [{torch.bfloat16: bfloat16, torch.float32: float32}[dtype] for dtype in dtypes]

    monkeypatch.setattr(processor, "_product_seconds", seconds)
    return asked


@pytest.mark.parametrize(
    ("bfloat16", "dtype"),
    [(1.0, "bfloat16"), (2.0, "bfloat16"), (3.9, "float32"), (20.0, "float32")],
    ids=["AMX", "AVX512_BF16", "about as fast", "emulated"],
)
def test_auto_is_bfloat16_only_where_its_product_is_clearly_faster(monkeypatch, bfloat16, dtype):
    takes(monkeypatch, bfloat16, float32=4.0)
    chosen = resolve_dtype(AUTO, "cpu")
    assert chosen.dtype == dtype
    faster = "faster" if dtype == "bfloat16" else "no faster"
    assert chosen.reason == f"this cpu multiplies bfloat16 {faster} than float32"


def test_auto_is_decided_once_and_said_in_one_line(monkeypatch, caplog):
    asked = takes(monkeypatch, 1.0, 4.0)
    with caplog.at_level(logging.INFO, "furina.kernels.processor"):
        assert {resolve_dtype(AUTO, device).dtype for device in ("cpu", "cpu:0")} == {"bfloat16"}
    assert asked == ["cpu"]
    (line,) = caplog.messages
    assert line == "dtype auto is bfloat16: this cpu multiplies bfloat16 faster than float32."


def test_a_device_that_cannot_multiply_bfloat16_computes_in_float32(monkeypatch):
    def refuse(kind, dtypes):
        raise RuntimeError("no bfloat16 here\nat a place")

    monkeypatch.setattr(processor, "_product_seconds", refuse)
    chosen = resolve_dtype(AUTO, "mps")
    assert chosen == ("float32", "mps does not multiply bfloat16 (no bfloat16 here)")


@pytest.mark.parametrize(("has", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_cuda_says_itself_whether_it_has_bfloat16_and_emulation_does_not_count(
    monkeypatch, has, dtype
):
    def is_supported(including_emulation: bool = True) -> bool:
        return has or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    assert resolve_dtype(AUTO, "cuda:1").dtype == dtype
    assert "Card has" in native_bfloat16("cuda")[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_a_named_dtype_stands_and_nothing_is_timed(monkeypatch, dtype):
    asked = takes(monkeypatch, 1.0, 4.0)
    assert resolve_dtype(dtype, "cpu") == (dtype, "asked for")
    assert not asked


def test_the_probe_times_both_dtypes_and_gives_the_threads_back():
    threads = torch.get_num_threads()
    times = processor._product_seconds("cpu", (torch.bfloat16, torch.float32))
    assert len(times) == 2 and all(seconds > 0 for seconds in times)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("processes", "threads"), [(1, 7), (2, 3), (8, 1)])
@pytest.mark.parametrize("named", [None, "OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_processes_share_the_cores_or_the_threads_that_the_user_named(
    monkeypatch, named, processes, threads
):
    given: list[int] = []
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if named:
        monkeypatch.setenv(named, "7")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7 if named else 64)
    monkeypatch.setattr(processor, "cores", lambda: 64 if named else 7)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    use_cores(processes)
    assert given == [threads]


@pytest.mark.parametrize(
    ("affinity", "usable", "found"), [({0, 4}, 2, 1), ({0, 1, 4, 5}, 4, 2), ({0, 1, 2, 3}, 2, 2)]
)
def test_two_threads_of_a_core_count_once_and_a_quota_holds(
    monkeypatch, tmp_path, affinity, usable, found
):
    for cpu in range(8):  # four cores of two threads each
        (tmp_path / str(cpu)).write_text(f"{cpu % 4},{cpu % 4 + 4}")
    monkeypatch.setattr(processor, "SIBLINGS", f"{tmp_path}/{{}}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity, raising=False)
    monkeypatch.setattr(joblib, "cpu_count", lambda only_physical_cores: usable)
    assert processor.cores() == found


def test_autocast_does_not_decide_what_the_processor_can(monkeypatch):
    seen: list[torch.dtype] = []
    linear = functional.linear

    def look(x, y):
        product = linear(x, y)
        seen.append(product.dtype)
        return product

    monkeypatch.setattr(functional, "linear", look)
    with torch.autocast("cpu", torch.bfloat16):
        processor._product_seconds("cpu", (torch.bfloat16, torch.float32))
    assert seen[:2] == [torch.bfloat16, torch.float32]


def test_a_record_keeps_what_auto_stands_for_and_says_nothing(monkeypatch, caplog):
    takes(monkeypatch, 1.0, 4.0)
    with caplog.at_level(logging.INFO, "furina.kernels.processor"):
        assert provenance().hardware.auto_dtype == (
            "bfloat16: this cpu multiplies bfloat16 faster than float32"
        )
    assert not caplog.messages
