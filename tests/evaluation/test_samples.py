from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from furina.errors import ConfigurationError, DataError
from furina.evaluation.samples import (
    ChoiceSample,
    TextSample,
    predict,
    read_samples,
    write_samples,
)

SAMPLES = [
    ChoiceSample(
        id=f"q{number}\u2028°",
        prompt_sha256="ab" * 32,
        answer=1,
        loglikelihoods=(-1.1 / 3, -7e-30, -1e4),
        lengths=(3, 1, 2),
        prediction={"acc": 1, "acc_norm": 1},
        correct={"acc": True, "acc_norm": True},
    )
    for number in range(3)
]


TEXTS = [
    TextSample("t", "cd" * 32, "5", "2 + 3\n#### 5", {"strict": "5", "flexible": None}, {"a": True})
]


@pytest.mark.parametrize("samples", [SAMPLES, TEXTS])
def test_what_is_written_is_read_back_exactly(tmp_path, samples):
    write_samples(tmp_path / "deep" / "samples.jsonl.gz", samples)
    assert read_samples(tmp_path / "deep" / "samples.jsonl.gz") == samples


def test_equal_samples_give_equal_bytes_under_any_name(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_samples(tmp_path / name, SAMPLES)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_a_failed_write_leaves_the_older_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "samples.jsonl.gz"
    write_samples(path, SAMPLES)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_samples(path, SAMPLES[:1])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    text = gzip.decompress(data)
    damaged = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "flipped": data[:20] + bytes([data[20] ^ 255]) + data[21:],
        "not-gzip": text,
        "not-json": gzip.compress(b"{"),
        "unknown-key": gzip.compress(text.replace(b'"answer"', b'"anser"')),
    }
    path.write_bytes(damaged[how])


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "flipped", "not-gzip", "not-json", "unknown-key"]
)
def test_a_damaged_file_is_one_clear_sentence(tmp_path, how):
    path = tmp_path / "samples.jsonl.gz"
    write_samples(path, SAMPLES)
    damage(path, how)
    with pytest.raises(DataError, match=r"samples\.jsonl\.gz is not a whole file"):
        read_samples(path)


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="evaluate first"):
        read_samples(tmp_path / "none.jsonl.gz")


def test_the_first_of_equal_choices_is_predicted():
    assert predict((-2.0, -1.0, -1.0), (1, 1, 1), "acc") == 1


def test_acc_norm_divides_by_the_choices_length():
    assert predict((-3.0, -4.0), (3, 8), "acc") == 0
    assert predict((-3.0, -4.0), (3, 8), "acc_norm") == 1


def test_an_unknown_metric_is_an_error():
    with pytest.raises(ConfigurationError, match="Did you mean 'acc_norm'"):
        predict((-1.0,), (1,), "acc_nrm")


def test_no_flipped_bit_changes_what_is_read(tmp_path):
    path = tmp_path / "samples.jsonl.gz"
    write_samples(path, SAMPLES)
    good, refused = path.read_bytes(), 0
    for bit in range(0, 8 * len(good), 7):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            assert read_samples(path) == SAMPLES  # such as where the file's time is
        except DataError:
            refused += 1
    assert refused > len(good)
