"""What a run on a long night needs beside its learning: one class of all the mixins that keep it going."""

from __future__ import annotations

from mel_lite.boundaries import Interruptible
from mel_lite.checkpointing import AtomicCheckpoints
from mel_lite.disk import PatientSave
from mel_lite.guards import NonFiniteGuard
from mel_lite.order import ExactOrder
from mel_lite.probe import Probed
from mel_lite.side_services import Sheltered
from mel_lite.statefiles import SafeState
from mel_lite.token_budget import TokenBudget
from mel_lite.tripwires import Watched


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
