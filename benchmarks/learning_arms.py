"""The arms of the learning study: options of MELConfig, and one internalization that only the study needs."""

from __future__ import annotations

from typing import Any

from mel_lite.lessons.internalise import AnalysisNLL, DrawnBatch
from mel_lite.types import Lesson, Status


class FailedNLL(AnalysisNLL):
    """Train on the analyses whose replay was wrong, in place of those whose replay was right."""

    def lessons(self, drawn: DrawnBatch) -> list[Lesson]:
        return [
            Lesson(row_id, each.analysis.context_ids, each.analysis.analysis_ids)
            for row_id, each in drawn.experiences
            if each.status is Status.REPLAY_FAILED
        ]


MEL: dict[str, Any] = {"algorithm": "mel"}
ARMS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": "grpo"},
    "mel": MEL,
    "mel-replay": MEL | {"internalisation": "replay"},
    "mel-quarter": MEL | {"mel_weight": 0.25},
    "mel-tenth": MEL | {"mel_weight": 0.1},
    "mel-failed": MEL | {"internalisation": "learning_arms:FailedNLL"},
    "mel-uplift": MEL | {"replay_criterion": "uplift", "replay_attempts": 2},
    "mel-right": MEL | {"internalisation": "right"},
    "mel-both": MEL | {"internalisation": "both"},
    "mel-experience": MEL | {"internalisation": "experience"},
    "mel-prompts": MEL | {"mel_normalization": "prompts"},
    "mel-pairs": MEL | {"pairs_per_group": 2},
    "rft": {"algorithm": "rft"},
    "rft-mel": {"algorithm": "rft", "meta_experience": True},
}
