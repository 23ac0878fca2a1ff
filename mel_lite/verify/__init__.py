"""Verifiers, which judge answers, and the worker processes that run them."""
