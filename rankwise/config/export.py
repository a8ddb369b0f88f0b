"""What `rankwise export` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.options import Options, option


@dataclass(frozen=True)
class ExportConfig(Options):
    """Export a merged checkpoint to GGUF files for llama.cpp, verified tensor by tensor."""

    model: str | None = option(
        help="merged model folder (with --adapter_gguf: the base)", aliases=("model_name", "model_path")
    )
    output_dir: str = option("exported_model", help="folder of the GGUF files", short="-o", aliases=("output_path",))
    outtype: list[str] = option(["f16", "q8_0"], help="quantization types: f32, f16, bf16, q8_0")
    mmproj: bool | None = option(help="also export vision tower and projector [for vision-language models]")
    name: str | None = option(
        help="base of the file names, <name>-<outtype>.gguf [the model folder's name]",
        aliases=("file_name",),  # in a recipe `name` is the stage's
    )
    base_model: str | None = option(help="base to measure the kept tuning against [as recorded by the merge]")
    target: str | None = option(help="device.json, or a folder with one [the model folder's]")
    adapter_gguf: str | None = option(help="export this LoRA adapter instead, each site's scale folded into B")
    llama_cpp_dir: str | None = option(help="llama.cpp with its converter [$LLAMA_CPP_DIR, else the cache]")
    install_converter: bool = option(False, help="download llama.cpp's converter into the cache first")
    no_verify: bool = option(False, help="skip verification of the files against the checkpoint")
