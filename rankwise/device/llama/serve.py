"""The process that holds a GGUF file: llama.cpp may abort on a bad file, and then only this process is gone.

    python -m rankwise.device.llama.serve --model model.gguf --mmproj mmproj.gguf     # {"address": "http://127.0.0.1:38211"}

It prints one line, its address, once the files are loaded and it answers. It ends when its standard input closes or
its parent is gone, so that nothing is left behind by a parent that was killed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from rankwise.errors import need

WATCH_S = 1.0  # how often the parent is looked for
ERRORS_ONLY = 1  # of llama.cpp's levels of talking; its errors are what a broken file is known by


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model, print the address, and serve until the parent disconnects."""
    given = _parser().parse_args(arguments)
    announce = _own_output()
    for leave, given_up in ((_leave_with_input, ()), (_leave_with_parent, (os.getppid(),))):
        threading.Thread(target=leave, args=given_up, daemon=True).start()
    server = _loaded(given)
    announce.write(json.dumps({"address": server.listening_address}) + "\n")
    announce.flush()
    threading.Event().wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rankwise.device.llama.serve", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mmproj")
    parser.add_argument("--lora", nargs=2, action="append", default=[], metavar=("FILE", "SCALE"))
    parser.add_argument("--context", type=int, default=0, help="tokens; 0: as many as the model was made for")
    parser.add_argument("--threads", type=int, default=0, help="0: llama.cpp's own choice")
    parser.add_argument("--exact", action="store_true", help="float32 keys and values, no flash attention")
    return parser


def _own_output() -> Any:
    """Standard output for the address alone; what a library prints goes to standard error."""
    announce = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return announce


def _loaded(given: argparse.Namespace) -> Any:
    """A server on a free port of this machine, the files loaded."""
    xllamacpp = need("xllamacpp", extra="device")
    settings = xllamacpp.CommonParams()
    settings.model.path = given.model
    if given.mmproj:
        settings.mmproj.path = given.mmproj
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, float(scale)) for path, scale in given.lora]
    if given.threads:
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = given.threads
    settings.n_ctx = given.context
    settings.n_parallel = 1
    if given.exact:
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.verbosity = ERRORS_ONLY
    settings.endpoint_props = True
    settings.ui = False
    settings.cache_ram_mib = 0  # prompts of earlier requests kept in memory would count as the model's
    try:
        return xllamacpp.Server(settings)
    except RuntimeError as error:
        sys.exit(str(error))


def _leave_with_input() -> None:
    """End the process at once when standard input closes: the parent is done, or dead."""
    while os.read(0, 1024):
        pass
    os._exit(0)


def _leave_with_parent(parent: int) -> None:
    """The same when the parent is gone, as a process that it forked may still hold the other end of the input."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os._exit(0)


if __name__ == "__main__":
    main()
