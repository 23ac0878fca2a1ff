"""Script that reports the TRL base classes of MELTrainer and MELConfig."""

REPORT = """
    import inspect, json
    from mel_lite import MELConfig, MELTrainer
    base = next(c for c in MELTrainer.__mro__ if c.__name__ == "GRPOTrainer")
    print(json.dumps({
        "base": base.__name__,
        "file": inspect.getsourcefile(base).replace("\\\\", "/").rsplit("/", 3)[-3:],
        "calls_compute_loss": "_compute_loss" in inspect.getsource(base.compute_loss),
        "config": [c.__name__ for c in MELConfig.__mro__[1:3]],
        "learning_rate": MELConfig.__dataclass_fields__["learning_rate"].default,
    }))
"""
