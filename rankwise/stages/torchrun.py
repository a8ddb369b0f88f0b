"""A command in several processes: torchrun started as a subprocess, because `rankwise run` itself is one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.store.files import write_json


def run_in_processes(command: str, options: Mapping[str, Any], processes: int, config: Path) -> None:
    """Run `rankwise COMMAND` on these options under torchrun; raises with its exit code where it fails."""
    write_json(config, {name: value for name, value in options.items() if value is not None})
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    finished = subprocess.run([*line, "-m", "rankwise.cli", *command.split(), str(config)], check=False)
    if finished.returncode:
        raise RankwiseError(f"rankwise {command} in {processes} processes failed; its message stands above")
