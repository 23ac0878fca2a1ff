"""MELTrainer inherits from TRL's class as released, even if another library has rebound the public name."""

from __future__ import annotations

import json
import textwrap

import pytest

from import_orders import REPORT
from mel_lite.errors import ConfigError
from mel_lite.trl_compat import check_trl_version
from warm_process import run_warm

REBIND = """
    import trl, trl.trainer, trl.trainer.grpo_trainer, trl.trainer.grpo_config

    class GeneratedTrainer(trl.trainer.grpo_trainer.GRPOTrainer.__mro__[1]):
        def compute_loss(self, *args, **kwargs):
            raise AssertionError("the generated trainer was used")

    class GeneratedConfig(trl.GRPOConfig):
        pass

    for module in (trl, trl.trainer, trl.trainer.grpo_trainer):
        module.GRPOTrainer = GeneratedTrainer
    for module in (trl, trl.trainer, trl.trainer.grpo_config, trl.trainer.grpo_trainer):
        module.GRPOConfig = GeneratedConfig
"""


def _report(*parts: str) -> dict[str, object]:
    done = run_warm("\n".join(textwrap.dedent(part) for part in parts))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("order", ["ours first", "rebound first"])
def test_the_base_is_trls_released_class_in_both_import_orders(order: str) -> None:
    parts = ("from mel_lite import MELConfig, MELTrainer", REBIND) if order == "ours first" else (REBIND,)
    report = _report(*parts, REPORT)
    assert report["base"] == "GRPOTrainer" and report["file"] == ["trl", "trainer", "grpo_trainer.py"]
    assert report["calls_compute_loss"]
    assert report["config"] == ["GRPOConfig", "_BaseConfig"] and report["learning_rate"] == 1e-6


def test_an_untested_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trl_version()
    monkeypatch.setattr("trl.__version__", "1.17.0")
    with pytest.raises(ConfigError, match=r"trl==1.17.0 is installed.*pip install 'trl>=1.15,<1.17'"):
        check_trl_version()
