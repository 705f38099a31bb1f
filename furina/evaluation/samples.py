"""Per-question outputs, stored so that a score can be computed again."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from furina.errors import ConfigurationError, DataError, nearest
from furina.storage import write_bytes


@dataclass(frozen=True)
class ChoiceSample:
    """One question as scored: the log-likelihood of every answer, and what follows from them.

    `loglikelihoods` are natural logarithms of P(answer | prompt); `lengths` the answers' characters
    without the leading space, by which acc_norm divides; `answer` the index of the right one.
    `prediction` and `correct` are by metric. `prompt_sha256` hashes the text before the answer.
    """

    id: str
    prompt_sha256: str
    answer: int
    loglikelihoods: tuple[float, ...]
    lengths: tuple[int, ...]
    prediction: dict[str, int]
    correct: dict[str, bool]


@dataclass(frozen=True)
class TextSample:
    """One item as generated: what the model wrote, and what each rule read out of it.

    `answer` is the right answer, empty where only running a program tells. `prediction` is None
    where a rule found nothing.
    """

    id: str
    prompt_sha256: str
    answer: str
    output: str
    prediction: dict[str, str | None]
    correct: dict[str, bool]


Sample = ChoiceSample | TextSample


def predict(loglikelihoods: Sequence[float], lengths: Sequence[int], metric: str) -> int:
    """Return the first best choice: by log-likelihood (acc) or per character (acc_norm)."""
    if metric == "acc":
        scores = list(loglikelihoods)
    elif metric == "acc_norm":
        scores = [value / length for value, length in zip(loglikelihoods, lengths, strict=True)]
    else:
        raise ConfigurationError(
            f"Unknown metric {metric!r}.{nearest(metric, ['acc', 'acc_norm'])}"
        )
    return scores.index(max(scores))


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write gzipped JSON lines atomically; equal samples give equal bytes."""
    lines = [json.dumps(asdict(sample), ensure_ascii=False, allow_nan=False) for sample in samples]
    write_bytes(Path(path), gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))


def read_samples(path: Path) -> list[Sample]:
    """Read what `write_samples` wrote; raises DataError if it is missing or damaged."""
    try:
        text = gzip.decompress(Path(path).read_bytes()).decode()
        return [_sample(json.loads(line)) for line in text.rstrip("\n").split("\n")]
    except FileNotFoundError as error:
        raise DataError(f"There are no per-question outputs at {path}: evaluate first.") from error
    except (OSError, EOFError, ValueError, TypeError, KeyError, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole file of per-question outputs ({error}): evaluate again."
        ) from error


def _sample(row: dict[str, object]) -> Sample:
    kind = TextSample if "output" in row else ChoiceSample
    if unknown := row.keys() ^ {field.name for field in fields(kind)}:
        raise ValueError(f"missing or unknown keys {sorted(unknown)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return kind(**values)  # type: ignore[arg-type]
