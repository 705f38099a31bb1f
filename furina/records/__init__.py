"""Result records: frozen dataclasses that are written to and read from JSON strictly."""

from furina.records.activity import (
    ACTIVITY_SCHEMA,
    ActivityRecord,
    ExpertWeights,
    TaskActivity,
    TokenExample,
)
from furina.records.codec import RecordError
from furina.records.environment import (
    Hardware,
    Provenance,
    peak_memory_bytes,
    provenance,
    reset_peak_memory,
    timestamp,
)
from furina.records.runs import (
    SCHEMA,
    Backbone,
    Data,
    Latency,
    Merge,
    RunRecord,
    Score,
    Spread,
    Status,
    Training,
    Variant,
)
from furina.records.studies import STUDY_SCHEMA, SearchRecord, SelectionRecord

__all__ = [
    "ACTIVITY_SCHEMA",
    "SCHEMA",
    "STUDY_SCHEMA",
    "ActivityRecord",
    "Backbone",
    "Data",
    "ExpertWeights",
    "Hardware",
    "Latency",
    "Merge",
    "Provenance",
    "RecordError",
    "RunRecord",
    "Score",
    "SearchRecord",
    "SelectionRecord",
    "Spread",
    "Status",
    "TaskActivity",
    "TokenExample",
    "Training",
    "Variant",
    "peak_memory_bytes",
    "provenance",
    "reset_peak_memory",
    "timestamp",
]
