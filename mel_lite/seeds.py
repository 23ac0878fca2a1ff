"""Counter-based seeds: the same (run seed, step, prompt, index, purpose) always gives the same randomness."""

from __future__ import annotations

import hashlib
import json

from mel_lite.types import Prompt


def seed_for(run_seed: int, *, step: int, prompt_hash: str, index: int, purpose: str) -> int:
    """Derive the seed of one sampled sequence.

    Equals the first 63 bits of BLAKE2b over the five values, so that it depends on nothing else: not on the process,
    the batch the sequence is sampled in, or what was sampled before. Python's own `hash` is salted per process.

    Returns: an int in [0, 2**63).
    """
    key = json.dumps([run_seed, step, prompt_hash, index, purpose]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def prompt_hash(prompt: Prompt) -> str:
    """16 hex digits naming a prompt: equal prompts have equal names, in every process and version."""
    return hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).hexdigest()
