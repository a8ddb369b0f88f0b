"""What `rankwise export` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.options import option


@dataclass(frozen=True)
class ExportConfig:
    """Merged checkpoint → GGUF files for llama.cpp, proven tensor by tensor."""

    model: str | None = option(
        help="merged model folder (with --adapter_gguf: the base)", aliases=("model_name", "model_path")
    )
    output_dir: str = option("exported_model", help="folder of the GGUF files", short="-o", aliases=("output_path",))
    outtype: list[str] = option(["f16", "q8_0"], help="types to write: f32, f16, bf16, q8_0")
    mmproj: bool | None = option(help="vision tower and projector as a second file [where the model sees]")
    name: str | None = option(
        help="how the files are called, <name>-<outtype>.gguf [the model folder's name]",
        aliases=("file_name",),  # in a recipe `name` is the stage's
    )
    base_model: str | None = option(help="compare with this base that the tuning is in [as the merge recorded]")
    target: str | None = option(help="device.json, or a folder with one [the model folder's]")
    adapter_gguf: str | None = option(help="write this LoRA adapter as GGUF instead, each site's scale folded into B")
    llama_cpp_dir: str | None = option(help="llama.cpp with its converter [$LLAMA_CPP_DIR, else the cache]")
    install_converter: bool = option(False, help="download llama.cpp's converter into the cache first")
    no_verify: bool = option(False, help="skip the comparison of the files with the checkpoint")
