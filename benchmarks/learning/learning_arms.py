"""The arms of the learning study: options of MELConfig, with the settings chosen for each regime on `tune` tasks."""

from __future__ import annotations

from typing import Any

DISTILL: dict[str, Any] = {"algorithm": "mel", "internalisation": "distill", "replay_criterion": "scored"}


def distill(context: str, mel_weight: float = 1.0, **options: Any) -> dict[str, Any]:
    """Return the options of an arm that distills with notes from `context`."""
    return DISTILL | {"mel_weight": mel_weight, "internalisation_options": {"context": context} | options}


FROZEN: dict[str, Any] = {"reader": "frozen", "per_prompt": "all", "mask": "shift", "sign": False}
"""The pilot's setting where reward is starved: all rules in the prompt, KL only where they change the reader's mind."""

FORKS: dict[str, Any] = {"pairs_per_group": 4, "pair_strategy": "distinct_forks"}
"""Lessons for up to four places of a group at which its rollouts part, so that the bank fills sooner."""

ARMS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": "grpo"},
    "grpo-dynamic": {"algorithm": "grpo", "dynamic_sampling_rounds": 4},
    "grpo-rest": {"algorithm": "grpo", "rest_after": 2},
    "mel": {"algorithm": "mel"},
    "mel-tenth": {"algorithm": "mel", "mel_weight": 0.1},
    "replay": {"algorithm": "mel", "internalisation": "replay"},
    "own": distill("own"),
    "own-unsigned": distill("own", sign=False),
    "bank": distill("bank"),
    "bank-unsigned": distill("bank", sign=False),
    "bank-frozen": distill("bank", 0.3, **FROZEN),
    "bank-forks": distill("bank", 0.3, **FROZEN) | FORKS,
    "bank-open": distill("bank", 0.3, **FROZEN) | FORKS | {"bank_settled_nats": 1.0},
    "bank-open-shuffled": distill("bank", 0.3, shuffled=True, **FROZEN) | FORKS | {"bank_settled_nats": 1.0},
    "bank-kept": distill("bank", 0.3, **FROZEN) | FORKS,
    "bank-kept-shuffled": distill("bank", 0.3, shuffled=True, **FROZEN) | FORKS,
    "bank-frozen-signed": distill("bank", 0.3, **FROZEN | {"sign": True}),
    "bank-shuffled": distill("bank", shuffled=True),
    "bank-frozen-shuffled": distill("bank", 0.3, shuffled=True, **FROZEN),
    "sibling": distill("sibling"),
    "sibling-unsigned": distill("sibling", sign=False),
    "sibling-frozen": distill("sibling", 0.3, **FROZEN),
    "sibling+bank": distill("sibling+bank"),
    "sibling+bank-open": distill("sibling+bank", 0.3, **FROZEN) | FORKS | {"bank_settled_nats": 1.0},
    "sibling-sampled": distill("sibling", form="sampled"),
    "no-notes": distill("none", 0.3, reader="frozen", sign=False),
    "credit": {"algorithm": "mel", "internalisation": "credit", "replay_criterion": "scored"},
}

WIDE: dict[str, Any] = {"num_iterations": 4, "learning_rate": 6e-4}
"""The best updates and rate of every arm on the second subject."""

CHOSEN: dict[str, dict[str, dict[str, Any]]] = {
    "starved": {
        "grpo": {"num_iterations": 4, "learning_rate": 1e-4},
        "bank-frozen": {"num_iterations": 4, "learning_rate": 1e-4},
        "bank-forks": {"num_iterations": 4, "learning_rate": 1e-4, "mel_weight": 0.3},
        "sibling": {"num_iterations": 4, "learning_rate": 1e-4, "mel_weight": 0.3},
    },
    "plenty": {
        "grpo": {"num_iterations": 4, "learning_rate": 1e-4},
        "bank": {"num_iterations": 2, "learning_rate": 2e-4, "mel_weight": 0.3},
        "bank-shuffled": {"num_iterations": 2, "learning_rate": 2e-4, "mel_weight": 0.3},
        "sibling": {"num_iterations": 3, "learning_rate": 1e-4, "mel_weight": 0.3},
    },
    "wide-plenty": {
        "grpo": WIDE,
        "bank-open": WIDE | {"mel_weight": 1.0},
        "bank-open-shuffled": WIDE | {"mel_weight": 1.0},
        "sibling": WIDE | {"mel_weight": 0.3},
    },
    "wide-starved": {"grpo": WIDE, "sibling": WIDE | {"mel_weight": 0.3}},
}
"""Settings of the reported runs, by regime and arm: the best on `tune`. Arms that were not tuned take those of GRPO."""
