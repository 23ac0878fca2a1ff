"""What a run on a long night needs beside its learning: one class of all the mixins that keep it going."""

from __future__ import annotations

from mel_lite.checkpointing import AtomicCheckpoints
from mel_lite.guards import NonFiniteGuard
from mel_lite.statefiles import SafeState


class ResilientRun(NonFiniteGuard, AtomicCheckpoints, SafeState):
    """Mixin over a TRL trainer: whole checkpoints without pickles, and no update that is not finite."""
