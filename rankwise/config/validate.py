"""What `rankwise validate` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankwise.config.sections import SPLITS, ScoredData
from rankwise.options import Options, option


@dataclass(frozen=True)
class ValidateConfig(Options):
    """Score under the device's conditions, and prove that llama.cpp runs what was trained."""

    export: str | None = option(help="export folder, or one GGUF file", aliases=("gguf", "model_path"))
    mmproj: str | None = option(help="vision part of a single GGUF file")
    reference: str | None = option(help="merged model the files were made from [as recorded in the export]")
    server: str | None = option(address=True, help="llama.cpp server that runs the files, on the phone for example")
    data: ScoredData = field(default_factory=ScoredData)
    split: str = option("dev", choices=SPLITS, help="official split")
    num_samples: int | None = option(least=1, help="number of rows, in file order [all]")
    outtype: list[str] = option(
        [], help="quantization types to validate; the last one is the one you ship [all exported]"
    )
    base_model: str | None = option(help="model before training, to measure the gain kept on the device")
    parity_samples: int = option(
        32, least=0, help="number of items on the parity ladder, spread over kinds of images; 0: no ladder"
    )
    top: int = option(64, least=2, help="top-k log-probabilities to compare per position")
    tolerance: float = option(
        10.0, above=0, help="allowed KL divergence as a multiple of the measured noise floor", aliases=("k",)
    )
    app_pixels: str | None = option(
        help="folder with the app's pixels: PNG files of the images' names, or sha256_rgb.json"
    )
    min_accuracy: float | None = option(above=0, most=1, help="minimum accuracy; below it exit 6")
    min_agreement: float | None = option(above=0, most=1, help="minimum top-1 token agreement; below it exit 6")
    max_new_tokens: int | None = option(least=1, help="maximum tokens per answer [the device's; 128 without one]")
    sweep: list[str] = option([], help="quantization types to try as well, made from f16: q5_k_m, q4_0 …")
    sweep_margin: float = option(0.02, above=0, below=1, help="non-inferiority margin of --sweep (accuracy)")
    llama_cpp_dir: str | None = option(help="llama.cpp with llama-quantize, for --sweep [$LLAMA_CPP_DIR]")
    context: int | None = option(help="context size of llama.cpp in tokens [as the longest sample needs]")
    threads: int | None = option(help="CPU threads for llama.cpp [llama.cpp's default]")
    batch_size: int = option(8, least=1, help="prompts per step of the reference")
    device: str = option("auto", help="device of the float32 reference: auto, cpu or cuda")
    output_dir: str = option("validation", help="folder for validation.json, plots and predictions", short="-o")
    seed: int = option(42, help="random seed of the bootstrap")
