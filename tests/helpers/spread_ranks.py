"""One process of runs whose weights are spread: `python spread_ranks.py FOLDER '{"name": {"option": value, ...}}'`.

`python spread_ranks.py train ...` is `mel-lite train ...`. The environment of `accelerate launch` says how weights are
spread; accelerate applies FSDP only on what it takes for GPUs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

import rank_run


def shard_on_cpu() -> None:
    """Let accelerate apply FSDP to processes on CPUs, over gloo."""
    original = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


if __name__ == "__main__":
    shard_on_cpu()
    if sys.argv[1] == "train":
        from mel_lite.cli.main import main

        sys.exit(main())
    for name, options in json.loads(sys.argv[2]).items():
        rank_run.main(Path(sys.argv[1]) / name, options, last=False)
    PartialState().destroy_process_group()
