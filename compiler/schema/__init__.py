"""The recipe as classes: every key, its type, range, default and one line of documentation.

The same classes structure the file, feed the error messages, the editor schema and the reference
page. A field without a default must be given; `"auto"` means that a pass decides and the plan says
what and why. The docstring under a field is its documentation.
"""

from __future__ import annotations

from compiler.schema.data import (
    CaptionsRecipe,
    CropRecipe,
    DataRecipe,
    MaskRecipe,
    RegularisationRecipe,
    SourceRecipe,
)
from compiler.schema.model import (
    AdapterRecipe,
    ComponentRecipe,
    EmbeddingsRecipe,
    MemoryRecipe,
    ModelRecipe,
    OffloadRecipe,
    PrecisionRecipe,
    SpeedRecipe,
    TextRecipe,
)
from compiler.schema.outputs import (
    CacheRecipe,
    CheckpointsRecipe,
    DeepSpeedRecipe,
    EvaluationRecipe,
    LaunchRecipe,
    PublishRecipe,
    TrackRecipe,
    ValidationRecipe,
)
from compiler.schema.recipe import Recipe
from compiler.schema.train import (
    EmaRecipe,
    GuardRecipe,
    LossRecipe,
    NoiseRecipe,
    OptimizerRecipe,
    ScheduleRecipe,
    SprintRecipe,
    TextEncodersRecipe,
    TimestepsRecipe,
    TrainRecipe,
)

__all__ = [
    "AdapterRecipe",
    "CacheRecipe",
    "CaptionsRecipe",
    "CheckpointsRecipe",
    "ComponentRecipe",
    "CropRecipe",
    "DataRecipe",
    "DeepSpeedRecipe",
    "EmaRecipe",
    "EmbeddingsRecipe",
    "EvaluationRecipe",
    "GuardRecipe",
    "LaunchRecipe",
    "LossRecipe",
    "MaskRecipe",
    "MemoryRecipe",
    "ModelRecipe",
    "NoiseRecipe",
    "OffloadRecipe",
    "OptimizerRecipe",
    "PrecisionRecipe",
    "PublishRecipe",
    "Recipe",
    "RegularisationRecipe",
    "ScheduleRecipe",
    "SourceRecipe",
    "SpeedRecipe",
    "SprintRecipe",
    "TextEncodersRecipe",
    "TextRecipe",
    "TimestepsRecipe",
    "TrackRecipe",
    "TrainRecipe",
    "ValidationRecipe",
]
