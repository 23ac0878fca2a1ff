"""The verifier of the run in this folder, which tells random texts apart: a random model has something to learn."""


def is_even(completion: str, answer: str | None = None) -> bool:
    """Return True when the UTF-8 bytes of the completion have an even sum."""
    return sum(completion.encode()) % 2 == 0
