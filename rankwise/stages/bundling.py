"""What `rankwise bundle` starts from: the form to ship, whether it was proven, and the trained model it is held to.

export.json, validation.json ── source_of ──▶ Source(files, doubts, predictions) ── trained ──▶ cases, float32 model
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import DataError, UsageError, VerificationError
from rankwise.files.atomic import fingerprint, read_document, read_object, sha256
from rankwise.files.run_folder import CONFIG, RunFolder
from rankwise.gguf.export import Exported, read_export
from rankwise.options.commands import BundleConfig, ValidateConfig
from rankwise.options.sections import ScoredData
from rankwise.pipeline.table import configured
from rankwise.ship.parity.floor import K
from rankwise.ship.validation import FILE, FORMAT
from rankwise.stages.shipped import LAST, Shipment, Shipped
from rankwise.stages.validating import Trained, trained_side

SHIPPED = "q8_0"
ITEMS = 200  # rows that golden vectors are chosen from
SCORES = ("task", "method", "n", "accuracy", "interval", "macro_f1", "metrics", "intervals_95")


@dataclass(frozen=True)
class Source:
    """The form to ship. validated: validation.json and how it was asked for; None without one. doubts: what was not
    proven, or found wrong; only with --allow_unverified may there be any."""

    exported: Exported
    form: str
    validated: Mapping[str, Any] | None
    asked: ValidateConfig | None
    doubts: tuple[str, ...]

    @property
    def text(self) -> Path:
        return self.exported.text(self.form)

    @property
    def mmproj(self) -> Path | None:
        return self.exported.mmproj(self.form)

    @property
    def files(self) -> list[Path]:
        return [file for file in (self.text, self.mmproj) if file]

    @property
    def predictions(self) -> Sequence[Mapping[str, Any]]:
        """Items with confidences; those of this form only."""
        known = self.validated is not None and self.validated.get("outtype") == self.form
        return self.validated["predictions"] if known and self.validated else []

    @property
    def by_form(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = (self.validated or {}).get("by_outtype", {}).get(self.form, {})
        return found

    @property
    def build(self) -> str | None:
        return self.by_form.get("runtime")

    @property
    def scores(self) -> dict[str, Any] | None:
        return {name: self.by_form[name] for name in SCORES if name in self.by_form} or None

    def tolerance(self, config: BundleConfig) -> float:
        """As asked for; else the validation's, so that both hold the files to one limit."""
        return config.tolerance or float((self.validated or {}).get("tolerance", K))

    def trained(self, config: BundleConfig) -> Trained:
        """The model that was converted, with the items of the validation, or those of --data_path."""
        shipment = Shipment((Shipped(self.form),), self.exported.folder, reference_of(config, self))
        return trained_side(self.as_validated(config), shipment)

    def as_validated(self, config: BundleConfig) -> ValidateConfig:
        asked = self.asked or ValidateConfig()
        data = config.data if config.data.data_path else asked.data
        if not (data.task and data.data_path):
            raise UsageError("golden vectors need items: --validation FOLDER, or --task TASK --data_path DATA")
        return dataclasses.replace(
            asked,
            export=str(self.exported.folder),
            data=own_data(data, config.data),
            split=config.split or asked.split,
            reference=reference_of(config, self),
            num_samples=min(asked.num_samples or ITEMS, ITEMS),
            parity_samples=config.num_golden,
            top=config.top,
            device="cpu",
        )


def own_data(data: ScoredData, given: ScoredData) -> ScoredData:
    """The device target that was named here counts."""
    return dataclasses.replace(data, device_target=given.device_target) if given.device_target else data


def reference_of(config: BundleConfig, source: Source) -> str:
    recorded = source.asked.reference if source.asked else None
    return config.reference or recorded or str(source.exported.content["model"]["path"])


def source_of(config: BundleConfig) -> Source:
    """VerificationError where the export or its validation is missing, broken or of other files, unless that is
    allowed; DataError for folders that are not what they should be."""
    exported = read_export(str(config.export))
    form = form_of(config, exported)
    validated, asked = validation_of(config)
    doubts = (*export_doubts(exported, form), *validation_doubts(config, exported, form, validated))
    if doubts and not config.allow_unverified:
        raise VerificationError(f"{exported.folder}: {'; '.join(doubts)}. --allow_unverified bundles it all the same")
    return Source(exported, form, validated, asked, doubts)


def form_of(config: BundleConfig, exported: Exported) -> str:
    """As asked for; else q8_0, else the smallest that there is."""
    if config.outtype:
        assert exported.text(config.outtype)
        return config.outtype
    known = [form for form in LAST if form in exported.outtypes]
    if not (known or exported.outtypes):
        raise DataError(f"{exported.folder}: holds no model to ship")
    return SHIPPED if SHIPPED in exported.outtypes else (known or list(exported.outtypes))[-1]


def validation_of(config: BundleConfig) -> tuple[dict[str, Any] | None, ValidateConfig | None]:
    folder = Path(config.validation or "")
    if not config.validation or not (folder / FILE).is_file():
        return None, None
    content = read_document(folder / FILE, FORMAT, "a validation")
    raw = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else None
    return content, configured("validate", raw, str(folder / CONFIG)) if raw is not None else None


def export_doubts(exported: Exported, form: str) -> list[str]:
    """The files as exported, and proven then."""
    found = [] if exported.content.get("verification") else ["the export was not verified (--no_verify)"]
    files = exported.content["files"][form]
    for kind, expected in files["sha256"].items():
        if sha256(exported.folder / files[kind]) != expected:
            found.append(f"{files[kind]} is not the file that was exported (its sha256 differs)")
    return found


def validation_doubts(
    config: BundleConfig, exported: Exported, form: str, validated: Mapping[str, Any] | None
) -> list[str]:
    if validated is None:
        place = f" in {Path(config.validation).name}" if config.validation else ""
        return [f"there is no validation{place} (rankwise validate EXPORT …)"]
    if form not in validated["by_outtype"]:
        return [f"{form} was not validated, only {', '.join(validated['by_outtype'])}"]
    found = [f"validation found: {failure}" for failure in validated["failures"] if failure.startswith(f"{form}:")]
    if form not in validated["parity"]:
        found.append(f"{form} was never on the parity ladder (--parity_samples 0)")
    return [*found, *other_files(config, exported, form)]


def other_files(config: BundleConfig, exported: Exported, form: str) -> list[str]:
    """Files that were validated under these names and are others now."""
    entry = RunFolder(str(config.validation)).stages().get("validate", {}).get("inputs", {})
    files = [exported.text(form), *([exported.mmproj(form)] if exported.mmproj(form) else [])]
    return [
        f"{file.name} is not the file that was validated"
        for file in files
        if file and entry.get(file.name, {}).get("fingerprint") not in (None, fingerprint(file))
    ]
