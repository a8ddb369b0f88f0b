"""What `rankwise validate` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankwise.config.sections import SPLITS, ScoredData
from rankwise.options import option


@dataclass(frozen=True)
class ValidateConfig:
    """Scores under the device's conditions, and the proof that what runs in llama.cpp is what was trained."""

    export: str | None = option(help="export folder, or one GGUF file", aliases=("gguf", "model_path"))
    mmproj: str | None = option(help="the vision part of a GGUF file given by itself")
    reference: str | None = option(help="merged model that the files were made from [the one that the export records]")
    server: str | None = option(
        address=True, help="address of a llama.cpp server (on the phone, say) that runs the files"
    )
    data: ScoredData = field(default_factory=ScoredData)
    split: str = option("dev", choices=SPLITS, help="which rows")
    num_samples: int | None = option(help="first N items, in file order")
    outtype: list[str] = option([], help="forms to validate, the one to ship last [all that were exported]")
    base_model: str | None = option(help="the model before training: how much of its gain the device keeps")
    parity_samples: int = option(32, help="items on the parity ladder, some of every kind of picture; 0: no ladder")
    top: int = option(64, help="tokens whose log-probabilities are compared at each place")
    tolerance: float = option(10.0, help="how many times the measured floor is still agreement, in KL", aliases=("k",))
    app_pixels: str | None = option(
        help="folder with what the app made of the pictures: PNG files of the same names, or sha256_rgb.json"
    )
    min_accuracy: float | None = option(help="share of 1: less is exit 6")
    min_agreement: float | None = option(help="share of 1, of places with the same likeliest token: less is exit 6")
    max_new_tokens: int | None = option(help="longest answer, in tokens [the device's; 128 without one]")
    sweep: list[str] = option([], help="further forms to make from the f16 file and compare: q5_k_m, q4_0 …")
    sweep_margin: float = option(0.02, help="loss of accuracy that is still no loss, for --sweep")
    llama_cpp_dir: str | None = option(help="llama.cpp with llama-quantize, for --sweep [LLAMA_CPP_DIR]")
    context: int | None = option(help="tokens that llama.cpp holds [what the longest sample needs]")
    threads: int | None = option(help="of llama.cpp [its own choice]")
    batch_size: int = option(8, help="prompts per step of the reference")
    device: str = option("auto", help="where the reference runs: auto, cpu or cuda; always float32")
    output_dir: str = option("validation", help="validation.json, plots, predictions", short="-o")
    seed: int = option(42, help="of the bootstrap")
