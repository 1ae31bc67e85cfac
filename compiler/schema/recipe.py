"""The whole of a recipe."""

from __future__ import annotations

from typing import Annotated

from attrs import field, frozen

from compiler.schema.data import (
    DataRecipe,
)
from compiler.schema.model import (
    AdapterRecipe,
    EmbeddingsRecipe,
    MemoryRecipe,
    ModelRecipe,
    PrecisionRecipe,
    SpeedRecipe,
    TextRecipe,
)
from compiler.schema.outputs import (
    CacheRecipe,
    CheckpointsRecipe,
    EvaluationRecipe,
    LaunchRecipe,
    PublishRecipe,
    TrackRecipe,
    ValidationRecipe,
)
from compiler.schema.ranges import (
    Seed,
)
from compiler.schema.train import (
    SprintRecipe,
    TrainRecipe,
)
from compiler.structure import Range


@frozen(kw_only=True)
class Recipe:
    """A training recipe."""

    schema: Annotated[int, Range(ge=1, le=1)] = 1
    """Version of the recipe language."""
    extends: str = ""
    """A recipe file or `preset:NAME` that this one differs from; this one's values win."""
    name: str
    """Of the run; also its folder below `runs`."""
    seed: Seed = 0
    """All randomness follows from it."""
    output: str = "runs"
    """Folder for run folders (relative to the recipe)."""
    model: ModelRecipe
    """The base model."""
    adapter: AdapterRecipe | None = None
    """An adapter on the frozen base; absent: a full fine-tune."""
    embeddings: EmbeddingsRecipe | None = None
    """New words that the text encoders learn; absent: none."""
    sprint: SprintRecipe | None = None
    """Distil the base into few steps; absent: it is trained as it is."""
    memory: MemoryRecipe = field(factory=MemoryRecipe)
    """What the run may use."""
    precision: PrecisionRecipe = field(factory=PrecisionRecipe)
    """Number formats."""
    speed: SpeedRecipe = field(factory=SpeedRecipe)
    """How the same formulas are computed faster."""
    text: TextRecipe = field(factory=TextRecipe)
    """How prompts are encoded."""
    data: DataRecipe
    """What it is trained on."""
    train: TrainRecipe
    """The training run."""
    checkpoints: CheckpointsRecipe = field(factory=CheckpointsRecipe)
    """What is kept to go on from."""
    validation: ValidationRecipe = field(factory=ValidationRecipe)
    """Pictures drawn while training."""
    evaluation: EvaluationRecipe = field(factory=EvaluationRecipe)
    """The loss of what is held out."""
    track: TrackRecipe = field(factory=TrackRecipe)
    """Where metrics go."""
    publish: PublishRecipe = field(factory=PublishRecipe)
    """Where the result goes."""
    cache: CacheRecipe = field(factory=CacheRecipe)
    """Cached latents and text embeddings."""
    launch: LaunchRecipe = field(factory=LaunchRecipe)
    """Where it runs."""
