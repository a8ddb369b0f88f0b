"""What travels with everything that is made of a training run: how its input is made, the device, the task.

adapter/ ── carry ──▶ smaller adapter, merged model, export, bundle
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rankwise.data import device, input_record
from rankwise.data.labelling import label_task
from rankwise.files.adapter import beside

CONTRACTS = (input_record.FILE, device.FILE, label_task.FILE)


def contracts(folder: Path) -> dict[str, Path]:
    """File name → file, of those that an artefact (of a checkpoint also: its run) has."""
    found = {name: beside(folder, name) for name in CONTRACTS}
    return {name: file for name, file in found.items() if file is not None}


def carry(source: Path, folder: Path) -> dict[str, Path]:
    """Copy them into another artefact's folder; name → the copy."""
    return {name: Path(shutil.copyfile(file, folder / name)) for name, file in contracts(source).items()}
