"""Subprocess that runs llama.cpp's vision encoder alone: images in, embeddings out. A broken file may crash it.

    python -m rankwise.device.parity.embed --model model.gguf --mmproj mmproj.gguf [--threads N] FOLDER

For every FOLDER/N.png it writes FOLDER/N.npy, (tokens, width) float32: what takes the place of the picture's tokens,
tile by tile, the whole picture last. It needs llama-cpp-python, whose bindings reach below the server's API.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rankwise.errors import VerificationError, need


def main(arguments: Sequence[str] | None = None) -> None:
    """Embed all pictures of a folder."""
    parser = argparse.ArgumentParser(prog="python -m rankwise.device.parity.embed", description=__doc__)
    for name in ("--model", "--mmproj"):
        parser.add_argument(name, required=True)
    parser.add_argument("--threads", type=int, default=0, help="0: llama.cpp's own choice")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    model, context = _loaded(given.model, given.mmproj, given.threads)
    for picture in sorted(given.folder.glob("*.png")):
        np.save(picture.with_suffix(".npy"), _embedded(model, context, Image.open(picture).convert("RGB")))


def _loaded(text: str, mmproj: str, threads: int) -> tuple[Any, Any]:
    llama, vision = _bindings()
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(text.encode(), llama.llama_model_default_params())
    settings = vision.mtmd_context_params_default()
    settings.use_gpu = settings.print_timings = settings.warmup = False
    if threads:
        settings.n_threads = threads
    context = vision.mtmd_init_from_file(mmproj.encode(), model, settings) if model else None
    if not context:
        raise VerificationError(f"llama.cpp can't load {text} with {mmproj}")
    return model, context


def _bindings() -> tuple[Any, Any]:
    brings = "llama-cpp-python"
    return need("llama_cpp", "", brings), need("llama_cpp.mtmd_cpp", "", brings)


def _embedded(model: Any, context: Any, picture: Image.Image) -> NDArray[np.float32]:
    llama, vision = _bindings()
    pixels = np.ascontiguousarray(np.asarray(picture))
    data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = vision.mtmd_bitmap_init(picture.width, picture.height, data)
    chunks = vision.mtmd_input_chunks_init()
    marker = vision.mtmd_default_marker()
    text = vision.mtmd_input_text(marker, len(marker), False, True)
    try:
        if vision.mtmd_tokenize(context, chunks, ctypes.byref(text), (vision.mtmd_bitmap_p_ctypes * 1)(bitmap), 1):
            raise VerificationError("llama.cpp could not tokenize the image")
        return np.concatenate(list(_parts(vision, context, chunks, llama.llama_model_n_embd(model))))
    finally:
        vision.mtmd_input_chunks_free(chunks)
        vision.mtmd_bitmap_free(bitmap)


def _parts(vision: Any, context: Any, chunks: Any, width: int) -> Iterator[NDArray[np.float32]]:
    """Embeddings of each tile, in order."""
    for number in range(vision.mtmd_input_chunks_size(chunks)):
        chunk = vision.mtmd_input_chunks_get(chunks, number)
        if vision.mtmd_input_chunk_get_type(chunk) != vision.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            continue
        if vision.mtmd_encode_chunk(context, chunk):
            raise VerificationError("llama.cpp could not encode the image")
        tokens = vision.mtmd_input_chunk_get_n_tokens(chunk)
        yield np.ctypeslib.as_array(vision.mtmd_get_output_embd(context), (tokens, width)).copy()


if __name__ == "__main__":
    main()
