"""Counter-based seeds: equal (run seed, step, prompt, index, purpose) always give equal random numbers."""

from __future__ import annotations

import hashlib
import json

from mel_lite.types import Prompt


def seed_for(run_seed: int, *, step: int, prompt_hash: str, index: int, purpose: str) -> int:
    """Return the seed of one sampled sequence.

    Equals the first 63 bits of BLAKE2b over the five values: an int in [0, 2**63). It depends on nothing else, such as
    the process, the batch, or earlier samples. (Python's `hash` is salted per process.)
    """
    key = json.dumps([run_seed, step, prompt_hash, index, purpose]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def prompt_hash(prompt: Prompt) -> str:
    """Return 16 hex digits that identify a prompt, the same in every process and version."""
    return hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).hexdigest()
