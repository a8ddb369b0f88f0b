"""What `rankwise bundle` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankwise.config.sections import SPLITS, ScoredData
from rankwise.options import Options, option


@dataclass(frozen=True)
class BundleConfig(Options):
    """Bundle all that an app needs to run the model, with golden vectors to replay."""

    export: str | None = option(help="export folder", aliases=("model_path",))
    output_dir: str = option("bundle", help="bundle folder", short="-o", aliases=("output_path",))
    outtype: str | None = option(help="quantization type to ship [q8_0 if exported, else the smallest]")
    validation: str | None = option("validation", help="`rankwise validate` folder: its items, verdict and confidences")
    reference: str | None = option(help="merged model the files were made from [as recorded in the export]")
    data: ScoredData = field(default_factory=ScoredData)
    split: str | None = option(help="split to take golden vectors from [the validation's]", choices=SPLITS)
    num_golden: int = option(8, least=1, help="number of golden vectors, spread over kinds of images")
    top: int = option(64, least=2, help="top-k log-probabilities to record per position")
    tolerance: float | None = option(
        above=0,
        help="allowed KL divergence as a multiple of the measured noise floor [the validation's; 10 without one]",
        aliases=("k",),
    )
    min_precision: float = option(
        0.9, above=0, below=1, help="precision the app must reach on answers it does not abstain from"
    )
    allow_unverified: bool = option(False, help="bundle even if export or validation is missing or failed")
    replay: str | None = option(help="bundle whose golden vectors to replay instead; exit 6 if a rung differs")
    server: str | None = option(address=True, help="llama.cpp server to replay on [started here]")
    app_pixels: str | None = option(
        help="for --replay: folder with the app's pixels for golden/*-source.*: *-device.png, or sha256_rgb.json"
    )
    context: int | None = option(help="context size of llama.cpp in tokens [as the longest sample needs]")
    threads: int | None = option(help="CPU threads for llama.cpp [llama.cpp's default]")
    seed: int = option(42, help="random seed of the reference")
