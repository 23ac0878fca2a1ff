"""Generation configs of published models."""

from __future__ import annotations

import logging
from typing import Any

from mel_lite.text import first_line

logger = logging.getLogger(__name__)


def make_generation_config_valid(model: Any) -> None:
    """Repair a generation config that transformers would refuse to save, such as a temperature without `do_sample`.

    Many published models ship one. Sampling settings turn `do_sample` on, as transformers advises; if that is not
    enough, only the special token ids are kept, with a warning.
    """
    from transformers import GenerationConfig

    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
        return
    except ValueError as error:
        reason = first_line(error)
    sampling, config.do_sample = config.do_sample, True
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = sampling
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)
        logger.warning("%s: its generation config is invalid and was reset (%s).", model.config._name_or_path, reason)
