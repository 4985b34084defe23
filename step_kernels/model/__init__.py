"""Step-3.7 end to end, thin: configuration, weights, layers, vision, cache, generation."""

from .checkpoint import CheckpointError
from .config import StepConfig
from .step import Step3p7

__all__ = ["CheckpointError", "Step3p7", "StepConfig"]
