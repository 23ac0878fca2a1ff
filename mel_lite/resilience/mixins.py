"""What a run on a long night needs beside its learning: one class of all the mixins that keep it going."""

from __future__ import annotations

from mel_lite.resilience.checkpoints import AtomicCheckpoints
from mel_lite.resilience.collapse import Watched
from mel_lite.resilience.disk import PatientSave
from mel_lite.resilience.nonfinite import NonFiniteGuard
from mel_lite.resilience.order import ExactOrder
from mel_lite.resilience.state_files import SafeState
from mel_lite.resilience.stop_cleanly import Interruptible
from mel_lite.resilience.trackers import Sheltered
from mel_lite.training.engine_probe import Probed
from mel_lite.training.micro_batches import TokenBudget


class ResilientRun(
    Interruptible,
    Watched,
    Probed,
    NonFiniteGuard,
    TokenBudget,
    Sheltered,
    PatientSave,
    AtomicCheckpoints,
    ExactOrder,
    SafeState,
):
    """Mixin over a TRL trainer: stops on a signal without loss, watches for collapse and for an engine that samples
    from another policy, skips updates that are not finite, bounds the memory of micro-batches, bears with failing side
    services and full disks, and saves whole
    checkpoints without pickles, from which it goes on in the same order.
    """
