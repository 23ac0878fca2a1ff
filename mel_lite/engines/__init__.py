"""Generation engines. `base.py` says what one is; each of the others is one."""
