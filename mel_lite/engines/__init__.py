"""Generation engines: `base.py` defines the interface, the other modules implement or choose one."""
