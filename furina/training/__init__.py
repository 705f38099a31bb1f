"""Fine-tuning with Lightning: one module for all methods, exact resume, answer-only loss."""

from furina.training.attention import training_attention
from furina.training.checkpointing import AtomicCheckpointIO, CheckpointError, ResumeCheckpoint
from furina.training.divergence import DivergedError
from furina.training.gradients import gradient_ratio
from furina.training.history import LossHistory
from furina.training.loss import answer_logits, answer_loss
from furina.training.module import FinetuneModule
from furina.training.progress import StepProgress
from furina.training.sharding import ShardedStrategy

__all__ = [
    "AtomicCheckpointIO",
    "CheckpointError",
    "DivergedError",
    "FinetuneModule",
    "LossHistory",
    "ResumeCheckpoint",
    "ShardedStrategy",
    "StepProgress",
    "answer_logits",
    "answer_loss",
    "gradient_ratio",
    "training_attention",
]
