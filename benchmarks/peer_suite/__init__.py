"""Run TRL's own tests of GRPOTrainer on TRL's class and on MELTrainer: `PYTHONPATH=benchmarks python -m peer_suite`."""
