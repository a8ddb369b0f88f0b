"""What `rankwise card` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.options import option

FILES = ("auto", "adapter", "merged", "export", "bundle")


@dataclass(frozen=True)
class CardConfig:
    """A model card from what a run has recorded, and the way to the Hugging Face hub."""

    run: str | None = option(help="run folder, or an adapter, merged model or export alone")
    files: str = option("auto", choices=FILES, help="what the card is for [what is furthest along in the run]")
    out: str | None = option(help="card to write [README.md in the run folder]", short="-o")
    title: str | None = option(help="name of the model [the repository's, else the run folder's]")
    license: str | None = option(help="license of the result [the base's, where its own card says it]")
    base_model: str | None = option(help="hub id of the base, where the run names a local folder")
    push_to_hub: str | None = option(help="ORG/NAME: upload the files and the card there")
    private: bool = option(False, help="make that repository a private one")
    allow_unverified: bool = option(False, help="upload although a verification failed or was skipped")
