"""The proof of a merge: first its files, then its logits; nothing gets its name before both hold.

    adapter's file ── A, B, scale ──┐
    base's files   ── W ────────────┴─ float32 ──▶ W + scale·B·A ◀── half a spacing of the type ── merged model's files

    base ──▶ logits ◀── effect of the adapter ──▶ base + adapter by PEFT ◀── tolerance of the type ──▶ merged model

The files are computed past PEFT and past the plan of the merge: changed tensors are base + scale·B·A, entry by entry,
rounded once; others are the base's. That shows what logits cannot: a matrix left unmerged that bfloat16's tolerance
would hide, a vision tower that text never reaches, rows of tokens that no prompt holds, an expert that no token is
routed to (each one is compared alone). The logits, in float32, show that the model runs as base + adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankwise.errors import DataError, VerificationError
from rankwise.files.adapter import CONFIG_NAME, PAIR_KEY, adapter_files, adapter_tensors
from rankwise.files.adapter_config import scale_of
from rankwise.files.atomic import read_object
from rankwise.files.checkpoint import Checkpoint, Weight, open_checkpoint
from rankwise.merge.logits import (
    Batch,
    attach_adapter,
    for_decoder,
    image_batch,
    layered_adapted,
    load,
    logits,
    require_finite,
    text_batch,
    weight_places,
)
from rankwise.merge.plan import MergePlan
from rankwise.merge.routing import Experts, RoutedExperts, reached_experts
from rankwise.models.expert_files import ExpertFiles
from rankwise.models.load import meta_model
from rankwise.models.sites import weight_table
from rankwise.models.vocabulary import with_rows

MAGNITUDE = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(\.weight)?")
ORDER = 1e-6, 1e-5  # sums in another order: a share of the entry, and of the largest change in the matrix
BLOCK = 2**22  # entries in memory at a time
SHOWN = 3
MORE = 32  # rows of tokens, where fewer reach not all of the adapted experts
NO_EFFECT = 1e-6  # relative: what float32 sums in another order differ by
# Relative error of the logits (rms) that rounding the merged weights may cause; a few times what was measured.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Files:
    """A model folder: its structure without weights, and where its files hold each parameter, and each expert of it."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    places: Mapping[str, Weight | ExpertFiles]
    experts: Mapping[str, ExpertFiles]

    @classmethod
    def of(cls, folder: Path) -> Files:
        checkpoint, model = open_checkpoint(folder), meta_model(str(folder))
        experts = weight_table(model, checkpoint.keys()).experts
        return cls(checkpoint, model, weight_places(model, checkpoint), experts)

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name].read(self.checkpoint)

    def names(self) -> dict[str, list[str]]:
        """Key → the parameters in it."""
        found: dict[str, list[str]] = {key: [] for key in self.checkpoint}
        for name, place in self.places.items():
            for key in place.keys if isinstance(place, ExpertFiles) else [place.key]:
                found[key].append(name)
        return found


@dataclass
class Change:
    """Change of one weight (out, in) by the adapter's file: scale·B·A, and DoRA's magnitudes."""

    scale: float
    halves: dict[str, Tensor]
    magnitude: Tensor | None = None

    def of_expert(self, expert: int, experts: int, module: nn.Module) -> Tensor:
        """Of one expert of this module's parameter, as the module stores its matrix, float32. PEFT's A holds expert
        after expert, B's columns take turns, and its product is turned where the module says `is_transposed`."""
        a, b = self.halves["A"], self.halves["B"]
        rank = len(a) // experts
        product = self.scale * (b[:, expert::experts].float() @ a[expert * rank : (expert + 1) * rank].float())
        return product.T if getattr(module, "is_transposed", False) else product

    def on(self, rows: slice, before: Tensor) -> Tensor:
        """Some rows of the changed weight, float32. DoRA (Liu et al. 2024): m · (W + Δ) / ‖W + Δ‖ by row."""
        after = before + self.scale * (self.halves["B"].flatten(1)[rows].float() @ self.halves["A"].flatten(1).float())
        if self.magnitude is None:
            return after
        lengths: Tensor = after.norm(dim=1, keepdim=True)
        return after * (self.magnitude.flatten()[rows, None].float() / lengths)


def require_written(plan: MergePlan, folder: Path) -> float:
    """Compare all files of a merged model with what they were made from; returns the largest error as a share of what
    rounding to its type explains.

    VerificationError, naming the tensors, where one is missing, is not the base's though nothing changes it, or is not
    base + adapter.
    """
    base, merged = Files.of(plan.base.path), Files.of(folder)
    changes = dict(read_changes(plan.adapter, merged.model))
    packed = {key for place in base.experts.values() if place.quantized for key in place.keys}
    wrong = [f"{key} is missing" for key in base.checkpoint if key not in merged.checkpoint and key not in packed]
    compared = [name for name, files in base.experts.items() if files.quantized or name in plan.touched]
    largest = 0.0
    for name in compared:
        shares = expert_errors(name, plan, base, merged, changes.get(name))
        largest = max(largest, *shares)
        wrong += [f"{name}, expert {e}, is not base + adapter" for e, share in enumerate(shares) if not share <= 1]
    for key, names in merged.names().items():
        if not set(names).isdisjoint(compared):
            continue
        if plan.touched.isdisjoint(names):
            if not is_kept(key, names, base, merged):
                wrong.append(f"{key} is not the base's")
            continue
        for name in names:
            share = largest_error(name, plan, base, merged, changes.get(name))
            largest = max(largest, share)
            if not share <= 1:
                wrong.append(f"{name} is not base + adapter")
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise VerificationError(
            f"{len(wrong)} tensors of the merged model differ from base + adapter: {'; '.join(wrong[:SHOWN])}{more}; "
            "nothing was written"
        )
    return largest


def is_kept(key: str, names: list[str], base: Files, merged: Files) -> bool:
    """Whether a tensor that nothing changes is the base's bit for bit, cast to what it is written as."""
    written = merged.checkpoint.tensor(key)
    stored = base.checkpoint.tensor(key) if key in base.checkpoint else base[names[0]]
    return written.shape == stored.shape and torch.equal(as_bytes(stored.to(written.dtype)), as_bytes(written))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def largest_error(name: str, plan: MergePlan, base: Files, merged: Files, change: Change | None) -> float:
    """The largest error of a weight as a share of what is allowed, some rows at a time; infinite for another shape."""
    module = merged.model.get_submodule(name.rpartition(".")[0])
    before, after = starting_weight(name, plan, base), merged[name]
    if before.shape != after.shape:
        return float("inf")
    before, after = (as_rows(tensor, module) for tensor in (before, after))
    step, worst = max(1, BLOCK // before.shape[1]), 0.0
    for rows in (slice(start, start + step) for start in range(0, len(before), step)):
        stored = before[rows].float()
        wanted = stored if change is None else change.on(rows, stored)
        limit = allowed_error(wanted, (wanted - stored).abs().max(), after.dtype)
        error = (after[rows].float() - wanted).abs_() / limit
        worst = max(worst, float(error.nan_to_num(nan=float("inf")).max()))
    return worst


def expert_errors(name: str, plan: MergePlan, base: Files, merged: Files, change: Change | None) -> list[float]:
    """`largest_error` of every expert of a parameter, one in memory at a time."""
    before, after = base.experts[name], merged.experts.get(name)
    if after is None or after.problem(merged.checkpoint):
        return [float("inf")] * before.experts
    module, whole = merged.model.get_submodule(name.rpartition(".")[0]), plan.change.whole.get(name)
    shares = []
    for expert in range(before.experts):
        stored = (before.expert(base.checkpoint, expert) if whole is None else whole[expert]).float()
        written = after.expert(merged.checkpoint, expert)
        wanted = stored if change is None else stored + change.of_expert(expert, before.experts, module)
        limit = allowed_error(wanted, (wanted - stored).abs().max(), written.dtype)
        error = (written.float() - wanted).abs_() / limit
        shares.append(float(error.nan_to_num(nan=float("inf")).max()))
    return shares


def starting_weight(name: str, plan: MergePlan, base: Files) -> Tensor:
    """What the adapter's factors are added to: the base's weight, or what the adapter has in its place, in as many rows
    as it has tokens; trained tokens' rows are the adapter's."""
    before = plan.change.whole.get(name)
    before = base[name] if before is None else before
    if name in plan.resized:
        before = with_rows(before, plan.rows[1])
    tokens, rows = plan.change.tokens.get(name, (None, None))
    return before if tokens is None or rows is None else before.float().index_copy(0, tokens, rows)


def as_rows(tensor: Tensor, module: nn.Module) -> Tensor:
    """(out, in); Conv1D and embeddings are stored the other way round."""
    turned = isinstance(module, Conv1D | nn.Embedding) and tensor.dim() == 2
    return tensor.T if turned else tensor.reshape(len(tensor), -1)


def allowed_error(wanted: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a spacing of the type at every entry, and what sums in another order differ by."""
    kind, (of_entry, of_change) = torch.finfo(dtype), ORDER
    spacing = wanted.abs().clamp_(min=kind.smallest_normal).mul_(kind.eps / 2 + of_entry)
    return spacing.add_(of_change * change)


def read_changes(adapter: Path, model: PreTrainedModel) -> Iterator[tuple[str, Change]]:
    """Parameter → its change, by the tensors and the config of the adapter's files."""
    config = read_object(adapter / CONFIG_NAME)
    found: dict[str, Change] = {}
    for name, tensor in adapter_tensors(adapter_files(adapter)[0]).items():
        match = PAIR_KEY.fullmatch(name) or MAGNITUDE.fullmatch(name)
        if match is None:
            continue
        path = adapted_parameter(match["path"], model, config.get("target_parameters") or ())
        change = found.setdefault(path, Change(scale_of(config, path, adapter / CONFIG_NAME), {}))
        if "half" in match.groupdict():
            change.halves[match["half"]] = tensor
        else:
            change.magnitude = tensor
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    yield from ((path if path in parameters else f"{path}.weight", change) for path, change in found.items())


def adapted_parameter(path: str, model: PreTrainedModel, targets: Sequence[str]) -> str:
    """The parameter of experts that the pair under a key adapts, or the key's own module. PEFT wraps a module once per
    parameter in target_parameters, in the order in which the module has them: the outermost key is the last one's."""
    module = path.replace(".base_layer", "")
    names = [f"{module}.{name}" for name, value in model.get_submodule(module).named_parameters(recurse=False)]
    held = [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]
    depth = path.count(".base_layer")
    return held[-1 - depth] if depth < len(held) and model.get_parameter(held[-1 - depth]).dim() == 3 else path


@dataclass(frozen=True)
class ReferenceLogits:
    """Logits of the base and of base + adapter on the same inputs, float32; which experts these reach, of a mixture."""

    batches: Sequence[Batch]
    base: Tensor
    adapted: Tensor
    reach: RoutedExperts | None = None


@dataclass(frozen=True)
class Agreement:
    """Difference between merged model and base + adapter, and the size of the adapter's own effect.

    `error` and `effect`: rms difference of the logits to base + adapter and of base + adapter to the base, both
    relative to the rms of base + adapter's. `same_top1`: share of positions with the same most likely token;
    `kl`: mean Kullback–Leibler divergence in nats of merged from adapted.
    """

    error: float
    effect: float
    max_difference: float
    same_top1: float
    kl: float

    @property
    def effect_lost(self) -> float:
        """Share of the adapter's effect that the difference amounts to."""
        return self.error / self.effect

    def require(self, dtype: torch.dtype) -> None:
        """VerificationError where the merged model is not base + adapter up to rounding to `dtype`."""
        require_effect(self.effect)
        tolerance = TOLERANCE[dtype]
        if not self.error <= tolerance:
            raise VerificationError(
                f"the merged model's logits differ from base + adapter's by {self.error:.2g} (relative rms), "
                f"above the tolerance for {dtype}, {tolerance:g}; nothing was written"
            )
        if self.error >= self.effect:
            raise VerificationError(
                f"rounding to {dtype} changes the logits by {self.error:.2g}, the adapter by {self.effect:.2g}: the "
                "adapter would be lost; keep more precision with --dtype float32 (or float16)"
            )

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"effect_lost": self.effect_lost}


def proof_words(proof: Mapping[str, float]) -> str:
    """What a verification measured, from `Agreement.as_dict` or a manifest's entry."""
    return (
        f"logits within {proof['error']:.1e} (relative rms; maximum {proof['max_difference']:.1e}) of base + "
        f"adapter's, same top token at {proof['same_top1']:.1%}, KL {proof['kl']:.1e} nats; the adapter's own "
        f"effect is {proof['effect']:.1e}, of which rounding costs {proof['effect_lost']:.2%}"
    )


def require_effect(effect: float) -> None:
    """DataError for NaN, which is the base's own: an adapter's is refused where it is read."""
    if math.isnan(effect):
        raise DataError("the base's logits are NaN or infinite: its weights are damaged")
    if not effect > NO_EFFECT:
        raise VerificationError(
            f"the adapter changes the logits by {effect:.1g} (relative rms), no effect: is it the right one, "
            "and was it trained?"
        )


def reference_logits(
    base: str,
    adapter: Path,
    *,
    pictures: bool = False,
    prompts: Batch | None = None,
    layered: bool = False,
    rows: tuple[int, int] | None = None,
    experts: Experts | None = None,
) -> ReferenceLogits:
    """Run the base, put the adapter on it, run it again. VerificationError where that changes nothing.

    pictures: look at images as well; an adapter of the vision tower or the projector shows only there. prompts: what
    to run them on, instead of random tokens. layered: one layer in memory at a time. rows: of the base's embeddings
    and of the adapter's, where they differ: the base gets as many (new ones zero), and both are asked about new tokens.
    experts: the adapted ones; where a token goes to not all of them, more tokens are run.
    """
    model = load(base, layered, rows[1] if rows else None)
    batches = [for_decoder(model, prompts) if prompts else text_batch(model)]
    if rows and rows[1] > rows[0]:
        batches.append(text_batch(model, range(*rows)))
    if pictures and "pixel_values" not in batches[0]:
        batches.append(image_batch(model, base))
    with reached_experts(model, experts or {}) as reached:
        before = logits(model, batches)
        if not RoutedExperts.of(experts or {}, reached).whole:
            batches.append(text_batch(model, rows=MORE))
            before = torch.cat([before, logits(model, batches[-1:])])
    if layered:
        require_finite(before, model)
        adapted = layered_adapted(base, adapter)
    else:
        adapted = attach_adapter(model, adapter)
    reach = RoutedExperts.of(experts, reached) if experts else None
    reference = ReferenceLogits(batches, before, logits(adapted, batches), reach)
    require_effect(relative(reference.adapted - before, reference.adapted))
    return reference


def merged_logits(folder: Path, batches: Sequence[Batch], *, layered: bool = False) -> Tensor:
    return logits(load(str(folder), layered), batches)


def compare(reference: ReferenceLogits, merged: Tensor) -> Agreement:
    adapted = reference.adapted
    log_adapted, log_merged = adapted.log_softmax(-1), merged.log_softmax(-1)
    return Agreement(
        error=relative(merged - adapted, adapted),
        effect=relative(adapted - reference.base, adapted),
        max_difference=float((merged - adapted).abs().max()),
        same_top1=float((merged.argmax(-1) == adapted.argmax(-1)).float().mean()),
        kl=max(0.0, float((log_adapted.exp() * (log_adapted - log_merged)).sum(-1).mean())),
    )


def relative(difference: Tensor, to: Tensor) -> float:
    return float(difference.norm() / to.norm())
