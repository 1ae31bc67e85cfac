"""The passes, in the one order in which they run. Each resolves one concern and notes why.

A pass may add diagnostics; it never prints and never raises on a user's mistake. A pass whose
ground is missing (an earlier pass failed) returns without a word: one mistake, one message.
"""

from __future__ import annotations

from collections.abc import Callable

from compiler.draft import Draft
from compiler.passes.batches import resolve_batches
from compiler.passes.components import resolve_components
from compiler.passes.data import resolve_data
from compiler.passes.embeddings import resolve_embeddings
from compiler.passes.evaluation import resolve_evaluation
from compiler.passes.keeping import judge_keeping
from compiler.passes.memory import resolve_memory
from compiler.passes.model import resolve_model
from compiler.passes.outputs import resolve_outputs
from compiler.passes.precision import resolve_precision
from compiler.passes.publish import resolve_publish
from compiler.passes.sharing import resolve_sharing
from compiler.passes.speed import resolve_speed
from compiler.passes.sprint import resolve_sprint
from compiler.passes.storage import resolve_storage
from compiler.passes.text_training import resolve_text_training
from compiler.passes.training import resolve_training

Pass = Callable[[Draft], None]

PASSES: tuple[tuple[str, Pass], ...] = (
    ("model", resolve_model),
    ("precision", resolve_precision),
    ("components", resolve_components),
    ("storage", resolve_storage),
    ("data", resolve_data),
    ("batches", resolve_batches),
    ("speed", resolve_speed),
    ("training", resolve_training),
    ("text training", resolve_text_training),
    ("embeddings", resolve_embeddings),
    ("sprint", resolve_sprint),
    ("sharing", resolve_sharing),
    ("outputs", resolve_outputs),
    ("evaluation", resolve_evaluation),
    ("keeping", judge_keeping),
    ("publish", resolve_publish),
    ("memory", resolve_memory),
)
