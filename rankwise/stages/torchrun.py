"""A command in several processes: torchrun started as a subprocess, because `rankwise run` itself is one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.store.files import write_json


def run_in_processes(command: str, options: Mapping[str, Any], processes: int, config: Path) -> None:
    """Run `rankwise COMMAND` on these options under torchrun; raises with its exit code where it fails."""
    write_json(config, {name: value for name, value in options.items() if value is not None})
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    if waited_for([*line, "-m", "rankwise.cli", *command.split(), str(config)]):
        raise RankwiseError(f"rankwise {command} in {processes} processes failed; its message stands above")


def waited_for(line: Sequence[str]) -> int:
    """The exit code. A run that is stopped tells torchrun, which tells the processes, and waits until they have saved;
    Ctrl-C has reached them already."""
    with subprocess.Popen(line) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.wait()
            raise
        except BaseException:
            child.terminate()
            child.wait()
            raise
