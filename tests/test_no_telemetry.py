"""No command connects to another machine unless it is asked to: neither our code nor a library by our doing.

One process takes the line of every command, and refuses and notes each look-up of a name and each connection beyond
this machine; so do its children. Variables that would keep libraries quiet are taken out. `export`, `study` and `demo`
go as far as they read; `advise`, `validate`, `bundle` and `card` as far as the small world of the lines lets them; all
others do their work.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_command_line import LINES, NO_OUTPUT, world

import rankwise

__all__ = ["world"]

GUARD = """
import errno, os, socket

def note(what):
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(os.environ.get("LINE", "") + f"\\t{what}\\n")

def here(host):
    return host in (None, "", b"", "localhost", "127.0.0.1", "::1", "0.0.0.0") or host == socket.gethostname()

def looked_up(host, *rest, **how):
    if here(host):
        return getaddrinfo(host, *rest, **how)
    note(f"look-up of {host}")
    raise socket.gaierror(socket.EAI_AGAIN, "refused by the test")

def connecting(of):
    def connect(self, address):
        if self.family == getattr(socket, "AF_UNIX", None) or here(address[0]):
            return of(self, address)
        note(f"connection to {address}")
        raise OSError(errno.ENETUNREACH, "refused by the test")
    return connect

getaddrinfo, socket.getaddrinfo = socket.getaddrinfo, looked_up
socket.socket.connect, socket.socket.connect_ex = map(connecting, (socket.socket.connect, socket.socket.connect_ex))
"""
DRIVER = """
import contextlib, io, json, os, sys
from rankwise import cli
for line in json.loads(sys.argv[1]):
    said, os.environ["LINE"] = io.StringIO(), " ".join(line)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = cli.main(line)
        except SystemExit as error:
            code = int(error.code or 0)
    print(json.dumps([" ".join(line), code, said.getvalue()[-500:]]), flush=True)
"""
STEPS = "--max_steps 1 --save_strategy no --use_cpu"
# Command → what its line gets for a short run. --dry-run: as far as it reads; its stages are the other commands.
SHORT = {
    "finetune": STEPS,
    "train": f"{STEPS} --no_plots",
    "evaluate": "--num_samples 2 --max_new_tokens 2",
    "ranks": "--no_plots",
    "check": "--run_model",
    "export": "--dry-run",
    "study": "--dry-run",
    "demo": "--dry-run",
    "tiny": "--quick",
    "doctor": "--dry-run",
    "features train": "--epochs 1",
    "label": "--val_fraction 0.5",
}
ON_HUB = ["ranks", "org/base", "org/tuned", "--no_plots"]
QUIET = ("HF_", "TRANSFORMERS_", "DO_NOT_TRACK", "DISABLE_TELEMETRY", "WANDB_", "TRACKIO_", "ATTEMPTS")


def tried(folder: Path, lines: list[list[str]]) -> tuple[list[tuple[str, int, str]], list[tuple[str, str]]]:
    """([(line, exit code, the end of what it said)], [(line, what was refused)])."""
    (folder / "guard").mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(GUARD)
    attempts = folder / "attempts"
    attempts.touch()
    path = [str(folder / "guard"), str(Path(rankwise.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(QUIET)}
    environment = kept | {"PYTHONPATH": os.pathsep.join(path), "ATTEMPTS": str(attempts), "HF_HOME": str(folder / "hf")}
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, json.dumps(lines)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    refused = [tuple(line.split("\t")) for line in attempts.read_text().splitlines()]
    return [json.loads(line) for line in done.stdout.splitlines()], refused


def moved(base: Path, folder: Path) -> Path:
    """A checkpoint that differs from its base."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    save_file({name: one + 0.01 * torch.randn_like(one) for name, one in tensors.items()}, folder / "model.safetensors")
    return folder


def test_no_command_calls_anyone(world: Path, tmp_path: Path) -> None:
    tuned, lines = moved(world / "base", tmp_path / "tuned"), []
    for place, element in enumerate(("fire", "water") * 4):
        picture = tmp_path / "photos" / element / f"{place}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 10.0 * place + 5).convert("RGB").save(picture)
    for number, (name, (line, _)) in enumerate(LINES.items()):
        given = line.replace("@/tuned", str(tuned)).replace("@/photos", str(tmp_path / "photos"))
        given = given.replace("@", str(world))
        words = [*name.split(), *given.split(), *SHORT.get(name, "").split()]
        lines.append(words if name in NO_OUTPUT else [*words, "-o", str(tmp_path / f"out{number}")])
    ended, attempts = tried(tmp_path, [*lines, ON_HUB])
    assert {line for line, _ in attempts} == {" ".join(ON_HUB)}, "which is asked to, and shows that an attempt is seen"
    assert {what for _, what in attempts} == {"look-up of huggingface.co"}
    codes = {
        name: (code, wanted, said) for (name, (_, wanted)), (_, code, said) in zip(LINES.items(), ended, strict=False)
    }
    assert {name: told for name, told in codes.items() if told[0] != told[1] and told[1] is not None} == {}
