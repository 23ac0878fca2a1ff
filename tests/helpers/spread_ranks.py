"""One process of runs whose weights are spread: `python spread_ranks.py FOLDER '{"name": {"option": value, ...}}'`.

`python spread_ranks.py train ...` is `mel-lite train ...`. The environment of `accelerate launch` says how weights are
spread; accelerate applies FSDP and DeepSpeed only on what it takes for GPUs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

import rank_run


def deepspeed_on_cpu() -> None:
    """Let accelerate apply DeepSpeed to processes on CPUs, over gloo, and DeepSpeed compile nothing."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def fsdp_on_cpu() -> None:
    """Let accelerate apply FSDP to processes on CPUs, over gloo."""
    original = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


if __name__ == "__main__":
    with_deepspeed = "ACCELERATE_USE_DEEPSPEED" in os.environ
    (deepspeed_on_cpu if with_deepspeed else fsdp_on_cpu)()
    if sys.argv[1] == "train":
        from mel_lite.cli.main import main

        sys.exit(main())
    for name, options in json.loads(sys.argv[2]).items():
        # accelerate gives up DeepSpeed where it is told to use CPUs.
        rank_run.main(Path(sys.argv[1]) / name, options | {"use_cpu": not with_deepspeed}, last=False)
    PartialState().destroy_process_group()
