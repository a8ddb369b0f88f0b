"""rankwise extract: two checkpoints (or saved deltas) → LoRA adapter, by truncated SVD of each delta.

rankwise extract BASE TUNED --plan configs/lora_rank_config.json -o adapter/
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.factors import Factors, share_kept, truncate
from rankwise.core.measure import Delta
from rankwise.core.plan import PlannedSite, RankPlan, clamped
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import LoraAdapter, LoraPair, carry, write_adapter
from rankwise.files.adapter_config import lora_config
from rankwise.files.atomic import about_to_write
from rankwise.files.checkpoint import open_checkpoint, resolve
from rankwise.files.plan import find_plan, read_plan
from rankwise.files.run_folder import RunFolder
from rankwise.merge.beside import tokenizer_files
from rankwise.models.adapters import publish
from rankwise.models.load import another_base, embedding_paths
from rankwise.models.sites import model_sites, tower_of, tower_prefixes
from rankwise.options.commands import ExtractConfig
from rankwise.options.sections import TOWERS
from rankwise.page.progress import progress
from rankwise.page.text import command_line
from rankwise.pipeline.idle import refuse_idle
from rankwise.ranks.deltas import (
    CheckpointPair,
    DeltaSource,
    SavedDeltas,
    check_finite,
    deltas,
    on_device,
    read_expert,
    weight_name,
)
from rankwise.ranks.fidelity import (
    RESIZED,
    Fidelity,
    OmittedTensor,
    SiteFidelity,
    left_out,
    require_change,
    require_kept,
)
from rankwise.ranks.probe import filter_sites, folder_of, open_source, source_metadata
from rankwise.ranks.proof import Both, Makers, Proof, both_models, prove, require_experts, with_tied
from rankwise.ranks.spectra import site_generator


@dataclass(frozen=True)
class Whole:
    """`modules`: paths of modules to save; `biases`: names of the adapted layers' biases (all of them, or none)."""

    modules: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()

    def names(self, model: nn.Module) -> list[str]:
        """Names of the tensors."""
        inside = [f"{path}.{name}" for path in self.modules for name in model.get_submodule(path).state_dict()]
        return inside + list(self.biases)


def find_whole(both: Both, rest: Sequence[OmittedTensor], pairs: Mapping[str, LoraPair]) -> Whole:
    """The modules that hold changed tensors and nothing else: embeddings, heads, norms, convolutions; no matrix that is
    a site, and no module of experts that are, because leaving that out was a choice. Of a tied pair of embeddings and
    head both or none."""
    model, changed = both.model, [row.name for row in rest]
    sites = {site.weight.rpartition(".")[0] for site in model_sites(model).values()}
    paths = dict(model.named_modules())
    holders = dict.fromkeys(name.rpartition(".")[0] for name in changed)
    modules = [path for path in holders if path in paths and path not in sites and not any(paths[path].children())]
    ends = embedding_paths(model)
    if model.all_tied_weights_keys and ends[0] in modules:
        modules += [path for path in ends if path not in modules]
    biased = any(name == f"{path}.bias" for path in pairs for name in changed)
    biases = [f"{path}.bias" for path in pairs if getattr(paths[path], "bias", None) is not None] if biased else []
    return Whole(tuple(path for path in paths if path in modules), tuple(biases))


def tensors_of(whole: Whole, both: Both) -> dict[str, Tensor]:
    """The tuned model's tensors by PEFT's names for them: a bias lies in the layer that an adapted one holds."""
    names = {name: name for name in whole.names(both.model)}
    names |= {name: name.removesuffix("bias") + "base_layer.bias" for name in whole.biases}
    return {key: both.tuned[name]() for name, key in names.items()}


def publish_proven(
    folder: Path, adapter: LoraAdapter, source: DeltaSource, both: Both | None, plan: RankPlan, fidelity: Fidelity
) -> tuple[Proof | None, list[Path]]:
    """Write the adapter, whole or not at all: loaded by PEFT, it must give the logits that `fidelity` says it has, and
    each expert must be the one it was made from. The proof, and the files.

    VerificationError where it does not. None: not compared, for want of a base with a config.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as temporary:
        written = write_adapter(temporary, adapter)
        proof = None
        if both:
            towers = tower_prefixes(both.model)
            names = [*adapter.pairs, *fidelity.whole]
            sees = any(tower_of(name, towers) in ("vision", "projector") for name in names)
            proof = prove(both, written, expected_weights(both, adapter.pairs, plan, fidelity), sees)
            proof.require()
            require_experts(source, written, both.model, fidelity)
        return proof, publish(written, folder)


def expected_weights(both: Both, pairs: Mapping[str, LoraPair], plan: RankPlan, fidelity: Fidelity) -> Makers:
    """The tuned model's weights; of sites base + B·A, of what is left out the base's."""
    names = [row.site.weight for row in plan.sites] + [row.name for row in fidelity.left_out]
    made = with_tied(both.model, {name: both.base[name] for name in names if name in both.base})
    adapted = {row.site.weight: pairs[row.site.path] for row in plan.sites if row.site.path in pairs}
    made |= {name: partial(with_pair, both.base[name], pair) for name, pair in adapted.items()}
    return both.tuned | made


def with_pair(base: Callable[[], Tensor], pair: LoraPair) -> Tensor:
    """The base's weight, or that of all experts, with the pair's change, float32."""
    weight = base().to(torch.float32, copy=True)
    for matrix, one in zip(weight if pair.experts else [weight], pair.matrices(), strict=True):
        matrix += one.change()
    return weight


def tokenizer_of(tuned: str | None, rest: Sequence[OmittedTensor], fidelity: Fidelity, folder: Path) -> dict[str, Path]:
    """The tuned model's tokenizer, copied where the adapter carries embeddings of another size than the base's."""
    resized = [row.name for row in rest if row.why == RESIZED and row.name in fidelity.whole]
    files = tokenizer_files(folder_of(open_checkpoint(resolve(tuned)))) if tuned and resized else []
    return {file.name: Path(shutil.copyfile(file, folder / file.name)) for file in files}


TASK_TYPES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


def run(config: ExtractConfig) -> Fidelity:
    check(config)
    notes: list[str] = []
    source = open_pair_or_deltas(config, notes)
    plan = planned_ranks(config, source, notes)
    both = both_models(source, base_of(config, source, plan))
    if config.save_modules and both is None:
        raise DataError(f"--save_modules needs the base's config.json, which {source.description} has not here")
    folder = RunFolder(config.output_dir)
    with folder.lock(), folder.recording("extract", inputs(config)) as record:
        about_to_write()
        pairs, fidelity = factor_deltas(source, plan, config.device, config.seed)
        rest = left_out(source, {weight_name(row.site.path, weight_names(source)) for row in plan.sites})
        whole = find_whole(both, rest, pairs) if both and config.save_modules else Whole()
        extra = tensors_of(whole, both) if both else {}
        fidelity = fidelity.beside(rest, [name.replace(".base_layer.", ".") for name in extra])
        carried = {"modules_to_save": list(whole.modules) or None, "bias": "lora_only" if whole.biases else "none"}
        adapter = LoraAdapter(settings(config, source, plan) | carried, pairs, extra)
        checked = None if config.no_verify else both
        proof, published = publish_proven(folder.path, adapter, source, checked, plan, fidelity)
        record.outputs |= {file.name: file for file in published}
        record.outputs |= carry(Path(str(config.deltas or config.tuned)), folder.path)
        record.outputs |= tokenizer_of(config.tuned, rest, fidelity, folder.path)
        record.outputs["fidelity"] = fidelity.write(folder.path)
        record.facts |= fidelity.facts() | {"verification": proof and asdict(proof)}
        folder.save_config(config)
    report(config, fidelity, notes, proof, both)
    return fidelity


def check(config: ExtractConfig) -> None:
    """Refuse invalid combinations of options before anything is read."""
    if bool(config.base and config.tuned) == bool(config.deltas) or bool(config.base) != bool(config.tuned):
        raise UsageError("extract needs one of: BASE TUNED (two checkpoints), --deltas DIR")
    if (config.plan is None) == (config.rank is None):
        raise UsageError("extract needs one of: --plan FILE (from `rankwise ranks`), --rank R")
    refuse_idle(config)
    if config.sites.flatten_conv:
        raise UsageError("--flatten_conv is for `ranks`: an adapter of flattened convolutions fits no model")


def inputs(config: ExtractConfig) -> dict[str, Path | str | None]:
    plan = find_plan(Path(config.plan)) if config.plan else None
    return {"base": config.base, "tuned": config.tuned, "deltas": config.deltas, "plan": plan}


def open_pair_or_deltas(config: ExtractConfig, notes: list[str]) -> DeltaSource:
    """With a plan every site is opened, so that a site that the plan names and the model lacks can be told from one
    that --towers, --include and --exclude leave out."""
    whole = replace(config.sites, towers=list(TOWERS), include=None, exclude=None)
    asked = whole if config.plan else config.sites
    return open_source(asked, notes, base=config.base, tuned=config.tuned, deltas=config.deltas)


def planned_ranks(config: ExtractConfig, source: DeltaSource, notes: list[str]) -> RankPlan:
    """One rank everywhere, or the plan's sites as far as the options ask for them."""
    if config.rank is not None:
        return RankPlan(tuple(clamped(site, config.rank, {}) for site in source.sites.values()))
    plan = read_plan(Path(config.plan or ""), source.sites)
    plan.require_ranks(str(config.plan))
    base = config.base or source_metadata(source).get("model_name")
    notes += another_base(str(config.plan), plan.model_name, base)
    kept = filter_sites({row.site.path: row.site for row in plan.sites}, config.sites)
    left_out = [row.site.path for row in plan.sites if row.site.path not in kept]
    if left_out:
        notes.append(
            f"{len(left_out)} sites of the plan are left out by --towers, --include or --exclude ({left_out[0]} …)"
        )
    return plan.within(kept)


def factor_deltas(source: DeltaSource, plan: RankPlan, device: str, seed: int) -> tuple[dict[str, LoraPair], Fidelity]:
    """Pairs and their fidelity, one matrix in memory at a time; those of experts last. DataError for entries that are
    not finite, and where no site has changed."""
    pairs: dict[str, LoraPair] = {}
    table: list[SiteFidelity] = []
    with progress(total=len(plan.sites), desc="extract", unit="site", leave=True) as bar:
        for row, found in planned_deltas(source, plan, device):
            pair, kept = factor_site(row, found, plan, seed, device)
            pairs |= {row.site.path: pair} if pair else {}
            table.append(kept)
            bar.update()
    if not pairs:
        require_change(source, {row.site.path: row.energy_total for row in table})
        raise DataError(f"{source.description}: the plan gives no rank to a site that has changed; nothing to extract")
    return pairs, Fidelity(tuple(table))


def planned_deltas(source: DeltaSource, plan: RankPlan, device: str) -> Iterator[tuple[PlannedSite, Iterable[Delta]]]:
    """The planned sites, with the delta of each, or of each of its experts in turn."""
    rows = {row.site.path: row for row in plan.sites}
    for site, delta in deltas(source, [row.site for row in plan.sites if not row.site.experts]):
        check_finite(site, delta)
        yield rows[site.path], [on_device(delta, device)]
    for row in plan.sites:
        if row.site.experts:
            yield row, (read_expert(source, row.site, expert, device) for expert in range(row.site.experts))


def factor_site(
    row: PlannedSite, found: Iterable[Delta], plan: RankPlan, seed: int, device: str
) -> tuple[LoraPair | None, SiteFidelity]:
    """The pair of a site, of its experts each from its own delta alone, and what it keeps. The pair of an expert that
    has not changed is zero. None where the plan gives no rank, or nothing has changed."""
    site, rank, generator = row.site, row.rank, site_generator(row.site, seed, device)
    scale = plan.scale(rank) if rank else 1.0
    pairs, energies, kept, noise, stored_as = list[LoraPair](), list[float](), list[float](), 0.0, None
    for number, delta in enumerate(found):
        factors = Factors(torch.zeros(site.shape[0], rank), torch.zeros(rank, site.shape[1]))
        if rank and delta.energy:
            factors = truncate(delta.matrix, rank, generator)
            factors = Factors(factors.left.cpu(), factors.right.cpu())
        pairs.append(LoraPair.of(factors, scale, site.transposed, site.peft))
        energies.append(delta.energy)
        kept.append(float(not delta.energy))
        if delta.energy:
            kept[-1] = min(1.0, factors.spectrum().energy_total / delta.energy)
            name = f"{site.path}, expert {number}" if site.experts else site.path
            require_kept(name, kept_of(delta, pairs[-1].factors()), kept[-1])
            noise, stored_as = noise + delta.energy * delta.noise_share_both, delta.stored_as or stored_as
    total = sum(energies)
    if not rank or not total:
        return None, SiteFidelity(site, 0, total, float(not total), note=why_omitted(total))
    pair = LoraPair.of_experts(pairs, site) if site.experts else pairs[0]
    share = sum(energy * part for energy, part in zip(energies, kept, strict=True)) / total
    note, experts = note_of(row, stored_as, noise / total), tuple(kept) if site.experts else ()
    return pair, SiteFidelity(site, rank, total, share, note=note, experts=experts)


def why_omitted(energy: float) -> str:
    return "rank 0 in the plan: left out" if energy else "the delta is zero: left out"


def kept_of(delta: Delta, factors: Factors) -> float:
    """Share of a delta's energy that these factors keep, by comparing the two."""
    inner = float(((delta.matrix.T @ factors.left.to(delta.matrix)).double() * factors.right.to(delta.matrix).T).sum())
    return share_kept(inner, factors.inner(factors), delta.energy)


def note_of(row: PlannedSite, stored_as: str | None, noise: float) -> str:
    """That the rank was clamped, or how much of what is kept may be noise, in steps, so that sites with the same remark
    are told together."""
    if row.clipped and "above min" in row.clipped:
        return f"rank {row.clipped}: clamped"
    share = next((limit for limit in (0.5, 0.1, 0.01) if noise > limit), None)
    if share is None:
        return ""
    kind = f"{stored_as} weights: more than {share:.0%} of the delta's energy"
    return f"{kind} may be rounding, and the energy kept counts it"


def base_of(config: ExtractConfig, source: DeltaSource, plan: RankPlan) -> str | None:
    return config.base or str(source_metadata(source).get("model_name") or plan.model_name) or None


def weight_names(source: DeltaSource) -> Container[str]:
    """The names of a source's tensors."""
    if isinstance(source, CheckpointPair):
        return source.places
    return source.checkpoint if isinstance(source, SavedDeltas) else ()


def settings(config: ExtractConfig, source: DeltaSource, plan: RankPlan) -> dict[str, Any]:
    """The fields of the adapter's config that do not follow from its tensors."""
    base = base_of(config, source, plan)
    known = source.config if isinstance(source, CheckpointPair) else None
    return lora_config(base, task_type(known)) | {"use_rslora": plan.use_rslora}


def task_type(model_config: Mapping[str, Any] | None) -> str:
    """PEFT's name for what the base does, by its architecture; causal language model unless it says otherwise."""
    architecture = str(((model_config or {}).get("architectures") or [""])[0])
    return next((kind for suffix, kind in TASK_TYPES.items() if architecture.endswith(suffix)), "CAUSAL_LM")


def report(config: ExtractConfig, fidelity: Fidelity, notes: list[str], proof: Proof | None, both: Both | None) -> None:
    for note in [*notes, *fidelity.notes()]:
        print(f"note: {note}")
    if fidelity.left_out and both and not config.save_modules:
        print("note: --save_modules carries embeddings, heads, norms and biases as they are")
    source = config.deltas or config.tuned
    print(f"extracted from {source}: {fidelity.summary()}")
    print(verdict(config, proof))
    print(f"adapter and fidelity.json in {config.output_dir}")
    if both:
        print(f"next: {next_command(config)}")


def next_command(config: ExtractConfig) -> str:
    return command_line("merge", config.output_dir, base_model=config.base)


def verdict(config: ExtractConfig, proof: Proof | None) -> str:
    if proof is None:
        return f"not verified ({'--no_verify' if config.no_verify else 'no base with a config.json here'})"
    return (
        f"verified: loaded by PEFT, base + adapter is the tuned model but for what is left out (logits within "
        f"{proof.error:.1e}, relative rms); from the tuned model's logits it is {proof.distance:.1%} as far as the base"
    )


def describe(config: ExtractConfig) -> list[str]:
    ranks = f"the ranks of {config.plan}" if config.plan else f"rank {config.rank}"
    return [f"factor the deltas with {ranks} (truncated SVD, {', '.join(config.sites.towers)} tower)"]
