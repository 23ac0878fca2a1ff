"""Is an answer right? Verifiers, and the worker processes that run them."""
