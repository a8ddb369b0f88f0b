"""Runtimes of a GGUF: llama.cpp in a subprocess, or a remote llama.cpp server, such as on a phone.

    with LlamaServer(Path("model-q8_0.gguf"), Path("mmproj-model-f16.gguf")) as runtime:
        runtime.complete("<|im_start|>User:<__media__>What is it?…", [png], max_new_tokens=32).text

    with RemoteServer("http://192.168.1.20:8080") as runtime: ...

Both give the same `Runtime`. llama.cpp aborts the process that hands it a broken file: here that is a child, and the
broken file is a VerificationError that names it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from rankwise.data.device import MARKER
from rankwise.device.llama.client import Completion, NotTold, RuntimeInfo, ServerRuntime, Talk
from rankwise.errors import DataError, ServiceError, VerificationError, need

__all__ = ["MARKER", "Completion", "LlamaServer", "NotTold", "RemoteServer", "Runtime", "RuntimeInfo"]

KEY_VARIABLE = "LLAMA_API_KEY"
STOP_S = 10.0
LAST_LINES = 12


class Runtime(Protocol):
    """An engine that answers prompts with images; `server_api.ServerRuntime` says what each method promises."""

    @property
    def info(self) -> RuntimeInfo: ...

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]: ...

    def detokenize(self, ids: Sequence[int]) -> str: ...

    def apply_template(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> str: ...

    def memory(self) -> int | None: ...

    def complete(
        self,
        prompt: str | Sequence[int],
        images: Sequence[bytes] = (),
        *,
        max_new_tokens: int = 32,
        top: int = 0,
        grammar: str | None = None,
        force: Sequence[int] | str | None = None,
        reuse: bool = False,
    ) -> Completion: ...


@dataclass
class LlamaServer:
    """xllamacpp's llama.cpp in a child process while the context is open; it listens on this machine only.

    loras: LoRAs on top of the model; the first one is applied, the others are at hand at scale 0.
    context: tokens of a prompt and its answer; None for as many as the model was made for. threads: None for
    llama.cpp's choice. exact: keys and values in float32 and no flash attention, for comparing a converted model with
    the original; a device keeps them in float16, which shows in the log-probabilities of unlikely answers.
    start_timeout: seconds until the files must be loaded; timeout: seconds for one answer. DataError where a file is
    missing, VerificationError where llama.cpp can't load it, ServiceError where it takes too long.
    """

    model: Path
    mmproj: Path | None = None
    context: int | None = None
    threads: int | None = None
    exact: bool = False
    loras: tuple[Path, ...] = ()
    start_timeout: float = 300.0
    timeout: float = 600.0
    _child: subprocess.Popen[str] | None = field(default=None, init=False, repr=False)
    _said: IO[bytes] | None = field(default=None, init=False, repr=False)

    @property
    def files(self) -> str:
        """The file names, for messages."""
        more = [*([self.mmproj] if self.mmproj else []), *self.loras]
        return " with ".join([str(self.model), ", ".join(map(str, more))]) if more else str(self.model)

    def __enter__(self) -> ServerRuntime:
        for path in (self.model, self.mmproj, *self.loras):
            if path is not None and not Path(path).is_file():
                raise DataError(f"no file {path}; `rankwise export` makes GGUF files")
        if importlib.util.find_spec("xllamacpp") is None:
            need("xllamacpp", extra="device")
        try:
            return self._started()
        except BaseException:
            self._stop()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def _started(self) -> ServerRuntime:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in _stop
        self._child = subprocess.Popen(
            self._command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, _import_path()))},
            start_new_session=True,  # an interrupt from the keyboard is the parent's to handle
        )
        talk = Talk(self._address(self._child), timeout=self.timeout, patience=self.start_timeout, lost=self._lost)
        build = f"xllamacpp {version('xllamacpp')}"
        return ServerRuntime(talk, build=build, where=self.files, peak=partial(peak_memory, self._child.pid))

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "rankwise.device.llama.serve", "--model", str(self.model)]
        for name, value in (("--mmproj", self.mmproj), ("--context", self.context), ("--threads", self.threads)):
            command += [] if value is None else [name, str(value)]
        for number, path in enumerate(self.loras):
            command += ["--lora", str(path), "0" if number else "1"]
        return [*command, "--exact"] if self.exact else command

    def _address(self, child: subprocess.Popen[str]) -> str:
        """What the child prints once it has loaded the files."""
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.append(_line(child)), daemon=True)
        reader.start()
        reader.join(self.start_timeout)
        if reader.is_alive():
            raise ServiceError(f"llama.cpp did not load {self.files} within {self.start_timeout:g} s")
        if not lines[0]:
            child.wait(STOP_S)
            raise VerificationError(f"llama.cpp can't load {self.files}: it {self._ended()}")
        return str(json.loads(lines[0])["address"])

    def _lost(self) -> None:
        if self._child is not None and self._child.poll() is not None:
            raise VerificationError(f"llama.cpp crashed while answering from {self.files}: it {self._ended()}")

    def _ended(self) -> str:
        """The child's exit status and its last output."""
        assert self._child is not None and self._said is not None
        code = self._child.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
        return how + ("".join(f"\n  {line}" for line in lines) if lines else " and said nothing")

    def _stop(self) -> None:
        if self._child is not None:
            assert self._child.stdin is not None and self._child.stdout is not None
            self._child.stdin.close()  # which the child ends on
            try:
                self._child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
            self._child.stdout.close()
        if self._said is not None:
            self._said.close()
        self._child = self._said = None


@dataclass(frozen=True)
class RemoteServer:
    """A llama.cpp server by its address, while the context is open. key: its --api-key, sent and never shown; None for
    what LLAMA_API_KEY says, llama.cpp's own variable for it.

    ServiceError where it can't be reached, is too old, or answers an error.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    patience: float = 60.0

    def __enter__(self) -> ServerRuntime:
        key = self.key or os.environ.get(KEY_VARIABLE)
        runtime = ServerRuntime(Talk(self.url, timeout=self.timeout, patience=self.patience, key=key))
        assert runtime.info
        return runtime

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass


def peak_memory(process: int) -> int | None:
    """Peak resident memory of a process in bytes, mapped files included; None where the system does not tell."""
    status = Path(f"/proc/{process}/status")
    if not status.is_file():
        return None
    found = [line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(found[0][1]) * 1024 if found else None


def _line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline()


def _import_path() -> tuple[str, str]:
    """Where the child finds this package, though it be installed nowhere."""
    return str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")
