"""What `rankwise card` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.options import Options, option

FILES = ("auto", "adapter", "merged", "export", "bundle")


@dataclass(frozen=True)
class CardConfig(Options):
    """Write a model card from a run's records; upload card and files to the Hugging Face hub."""

    run: str | None = option(help="run folder, or an adapter, merged model or export alone")
    files: str = option("auto", choices=FILES, help="files to describe [the last product of the run]")
    out: str | None = option(help="card to write [README.md in the run folder]", short="-o")
    title: str | None = option(help="model name [the repository's, else the run folder's]")
    license: str | None = option(help="license of the result [from the base's own card]")
    base_model: str | None = option(help="hub id of the base, if the run names a local folder")
    push_to_hub: str | None = option(help="ORG/NAME to upload files and card to")
    private: bool = option(False, help="make the repository private")
    allow_unverified: bool = option(False, help="upload even if a verification failed or was skipped")
