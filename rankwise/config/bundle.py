"""What `rankwise bundle` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankwise.config.sections import SPLITS, ScoredData
from rankwise.options import option


@dataclass(frozen=True)
class BundleConfig:
    """Everything that an app needs to run the model, with inputs and what must come out of them."""

    export: str | None = option(help="export folder", aliases=("model_path",))
    output_dir: str = option("bundle", help="folder of the bundle", short="-o", aliases=("output_path",))
    outtype: str | None = option(help="form to ship [q8_0 where it was exported, else the smallest]")
    validation: str | None = option(
        "validation", help="folder of `rankwise validate`: its items, its verdict, its confidences"
    )
    reference: str | None = option(help="merged model that the files were made from [the one that the export records]")
    data: ScoredData = field(default_factory=ScoredData)
    split: str | None = option(help="rows that golden vectors are taken from [the validation's]", choices=SPLITS)
    num_golden: int = option(8, help="golden vectors, some of every kind of picture")
    top: int = option(64, help="tokens whose log-probabilities are written down at each place")
    tolerance: float | None = option(
        help="how many times the measured floor is still agreement, in KL [the validation's; 10 without one]",
        aliases=("k",),
    )
    min_precision: float = option(0.9, help="share of right answers that the app wants where it does not say unsure")
    allow_unverified: bool = option(False, help="bundle though export or validation is missing or found faults")
    replay: str | None = option(help="a bundle: replay its golden vectors instead; exit 6 where a rung differs")
    server: str | None = option(
        address=True, help="address of the llama.cpp server that --replay asks [one of our own]"
    )
    app_pixels: str | None = option(
        help="for --replay: folder with what the app made of golden/*-source.*: *-device.png, or sha256_rgb.json"
    )
    context: int | None = option(help="tokens that llama.cpp holds [what the longest sample needs]")
    threads: int | None = option(help="of llama.cpp [its own choice]")
    seed: int = option(42, help="of the trained side's options")
