"""Time and tokens of the phases of a step."""

from __future__ import annotations

import pytest

from mel_lite.engines.metered import PhaseClock


def test_the_innermost_open_phase_is_named() -> None:
    clock, seen = PhaseClock(), []
    with clock.rest("update"):
        seen.append(clock.phase)
        with clock("rollout"):
            seen.append(clock.phase)
        with pytest.raises(KeyError), clock("analysis"):
            raise KeyError
        seen.append(clock.phase)
    assert [*seen, clock.phase] == ["update", "rollout", "update", ""]


def test_phases_are_timed_separately_and_drained() -> None:
    clock = PhaseClock()
    with clock("rollout"):
        clock.generated_tokens += 10
    with pytest.raises(KeyError), clock("analysis"):
        raise KeyError
    metrics = clock.drain()
    assert metrics["time/rollout_s"] >= 0 and "time/analysis_s" in metrics and metrics["mel/generated_tokens"] == 10
    assert clock.drain() == {"mel/generated_tokens": 0.0}
