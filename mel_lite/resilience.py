"""What a run on a long night needs beside its learning: one class of all the mixins that keep it going."""

from __future__ import annotations

from mel_lite.boundaries import Interruptible
from mel_lite.checkpointing import AtomicCheckpoints
from mel_lite.guards import NonFiniteGuard
from mel_lite.statefiles import SafeState


class ResilientRun(Interruptible, NonFiniteGuard, AtomicCheckpoints, SafeState):
    """Mixin over a TRL trainer: stops on a signal without loss, skips updates that are not finite, saves whole
    checkpoints without pickles."""
