"""From an arm's name to its training settings: ranks within the budget, scales, initialization, phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from rankwise.core.allocate import invert, is_equal, parse_budget, plan_of, shuffle, spent, uniform
from rankwise.core.phase import Bound, BoundNorm, bind
from rankwise.core.schedule import parse_schedule
from rankwise.core.site import Site
from rankwise.errors import UsageError, VerificationError
from rankwise.evaluate.likelihood import Batch
from rankwise.files.atomic import read_object, write_json
from rankwise.options.commands import RanksConfig
from rankwise.options.sections import SpectrumSection
from rankwise.options.study import StudyConfig
from rankwise.ranks.deltas import SavedDeltas
from rankwise.ranks.gain import mean_gradients
from rankwise.ranks.spectra import measure_sites
from rankwise.study.arms import (
    OF_THE_BASE,
    PARTS,
    RULES,
    STARTED,
    Gains,
    Probed,
    gains_of,
    part_of,
    ranks_within,
    rule_of,
    schedule_of,
    uniform_ranks,
)
from rankwise.study.design import Contender, Run
from rankwise.study.importance import (
    FISHER_RANK,
    ITEMS,
    allocated_sizes,
    diminishing,
    gradient_start,
    gradient_variance,
    items_of,
    mean_products,
)
from rankwise.study.material import Material, probe_rows
from rankwise.train.adapter import input_directions
from rankwise.train.together.alone import allocated_ranks
from rankwise.train.together.optimizer import ArmSettings
from rankwise.train.together.starts import SCALE, Pairs, directed_start, random_start, row_order, scales_of, warm_start
from rankwise.train.together.train import Arm

HIGH = 4
SIGNAL_ROWS, SIGNAL_BATCH = 256, 16
Ranks = Mapping[Site, int]


@dataclass
class Plans:
    """Ranks and starts of every run; what is costly is made once. folder: where ranks are kept, of this recipe only."""

    config: StudyConfig
    material: Material
    probes: Sequence[SavedDeltas]
    folder: Path
    timed_steps: Mapping[str, int] = field(default_factory=dict)
    _gains: dict[tuple[str, str, int], Gains] = field(default_factory=dict)
    _ranks: dict[tuple[str, str, int], Ranks] = field(default_factory=dict)
    _probed: dict[int, Probed] = field(default_factory=dict)
    _directions: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    _gradients: dict[int, Mapping[Site, Tensor]] = field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        return self.config.max_rank

    @cached_property
    def sites(self) -> list[Site]:
        return list(self.material.sites)

    def budget(self, text: str) -> int:
        return parse_budget(text, self.sites)

    def uniform(self, budget: str) -> Ranks:
        if ("uniform", budget, 0) not in self._ranks:
            found = uniform_ranks(self.sites, self.budget(budget))
            if max(found.values()) > self.max_rank:
                raise UsageError(f"--budgets {budget} is above --max_rank {self.max_rank} everywhere; raise it")
            self._ranks["uniform", budget, 0] = found
        return self._ranks["uniform", budget, 0]

    def probe_of(self, seed: int) -> int:
        return seed % (len(self.config.probe.deltas) or self.config.probe.probes)

    def signal_batches(self, probe: int) -> list[Batch]:
        """Training rows for rules that run the model: the probe's own where it is the study's."""
        rows = [self.material.rows[index] for index in probe_rows(self.material, self.config, probe)[:SIGNAL_ROWS]]
        parts = [rows[start : start + SIGNAL_BATCH] for start in range(0, len(rows), SIGNAL_BATCH)]
        batches = [self.material.collate(part) for part in parts]
        names = ("input_ids", "attention_mask", "labels")
        return [{name: batch[name].to(self.material.device) for name in names} for batch in batches]

    def probed(self, probe: int) -> Probed:
        if probe not in self._probed:
            device = self.material.device
            source = self.probes[probe]
            chosen = replace(source, sites={site.path: site for site in self.sites})
            how = RanksConfig(spectrum=SpectrumSection(max_rank=self.max_rank, exact=True))
            measured = measure_sites(chosen, how, lambda *_: None)
            deltas = {site: source.read(site).matrix.to(device) for site in self.sites if not site.experts}
            spectra = {site: row.spectrum for site, row in measured.items()}
            self._probed[probe] = Probed(self.material.model, spectra, deltas, self.signal_batches(probe))
        return self._probed[probe]

    def gains(self, rule: str, budget: str, probe: int) -> Gains:
        """Of all budgets alike, but for AdaLoRA, which is run for each."""
        place = (rule, budget if rule == "adalora" else "", probe)
        if place not in self._gains:
            if rule in OF_THE_BASE:
                values = self.values(rule, budget, probe)
                self._gains[place] = {site: diminishing(value, self.max_rank) for site, value in values.items()}
            else:
                self._gains[place] = gains_of(rule, self.probed(probe), self.max_rank)
        return self._gains[place]

    def values(self, rule: str, budget: str, probe: int) -> Mapping[Site, float]:
        """The number per site that a rule ranks by."""
        model, sites = self.material.model, self.sites
        if rule == "gora":
            return mean_products(model, self.gradients(probe))
        if rule == "adalora":
            return allocated_sizes(self.adalora(budget, probe))
        start = random_start(dict.fromkeys(sites, FISHER_RANK), self.config.seed, self.max_rank)
        return gradient_variance(model, sites, items_of(self.signal_batches(probe)), start, SCALE)

    def gradients(self, probe: int) -> Mapping[Site, Tensor]:
        """Of the mean loss of the first items of a probe's rows."""
        if probe not in self._gradients:
            batches = self.signal_batches(probe)[: ITEMS // SIGNAL_BATCH]
            self._gradients[probe] = mean_gradients(self.material.model, self.sites, batches)
        return self._gradients[probe]

    def adalora(self, budget: str, probe: int) -> Mapping[Site, int]:
        """What AdaLoRA's ranks are after as many steps on a probe's rows as the probe has, from twice the budget's
        mean rank to that, at the middle of the grid of rates (Zhang et al. 2023, arXiv 2303.10512, sections 3.2 and
        3.3). Departures: only the ranks are taken; another LoRA of these ranks is trained from the start."""
        own, grid, material = self.config.probe, self.config.grid, self.material
        rows = [material.rows[position] for position in probe_rows(material, self.config, probe)]
        settings = ArmSettings(own.probe_steps, own.probe_batch_size)
        order = row_order(len(rows), settings.steps * settings.batch_size, self.config.seed + probe)
        rate = (grid.grid_low * grid.grid_high) ** 0.5
        target = max(1, round(fmean(self.uniform(budget).values())))
        found = allocated_ranks(
            material.model, self.sites, target, rate, rows, order, material.collate, settings, self.config.seed + probe
        )
        return {site: found[site.path] for site in self.sites}

    def of_rule(self, rule: str, budget: str, seed: int) -> Ranks:
        """The ranks that a rule gives, from the probe whose turn it is; kept in the folder, for they can be costly."""
        probe = self.probe_of(seed)
        if (rule, budget, probe) not in self._ranks:
            path = self.folder / f"{rule}-{budget.replace(':', '-')}-{probe}.json"
            if not path.is_file():
                found = ranks_within(self.gains(rule, budget, probe), self.budget(budget), self.max_rank)
                write_json(path, {site.path: rank for site, rank in found.items()})
            kept = read_object(path)
            self._ranks[rule, budget, probe] = {site: kept[site.path] for site in self.sites}
        return self._ranks[rule, budget, probe]

    def ranks(self, contender: Contender, seed: int) -> Ranks:
        """The ranks to train. `compress` trains four times the budget and is cut to it afterwards."""
        config = self.config
        budget, kind = contender.budget, contender.arm.partition(":")[0]
        if config.kind == "phases":
            rule = config.schedule_plan
            return self.uniform(budget) if rule == "uniform" else self.of_rule(rule, budget, seed)
        if kind == "compress":
            high = uniform(self.sites, HIGH * self.budget(budget))
            return {site: min(rank, self.max_rank) for site, rank in high.items()}
        if kind in (*RULES, *STARTED, "shuffled", "inverted", "plan-warm"):
            ranks = self.of_rule(rule_of(contender.arm), budget, seed)
            if kind == "shuffled":
                return shuffle(ranks, torch.Generator().manual_seed(seed))
            return invert(ranks) if kind == "inverted" else ranks
        if kind in PARTS:
            return uniform_ranks(part_of(self.sites, kind), self.budget(budget))
        return self.uniform(budget)

    def checked_ranks(self, contender: Contender, seed: int) -> Ranks:
        """The ranks, once their parameters are those of the budget within half a percent."""
        ranks, budget = self.ranks(contender, seed), self.budget(contender.budget)
        if contender.arm != "compress" and not is_equal(ranks, budget):
            raise VerificationError(
                f"{contender.arm} has {spent(ranks):,} parameters at {contender.budget}, which is {budget:,}: more "
                "than 0.5 % apart, so it could not be compared"
            )
        return ranks

    def scales(self, run: Run, ranks: Ranks) -> dict[str, float]:
        return scales_of(ranks, run.scale, self.uniform(run.contender.budget))

    def start(self, run: Run, ranks: Ranks, scales: Mapping[str, float]) -> Pairs:
        kind = run.contender.arm.partition(":")[0]
        if kind in ("warm", "plan-warm"):
            return warm_start(ranks, self.probed(self.probe_of(run.seed)).deltas, scales, run.seed)
        if kind == "eva+start":
            return directed_start(ranks, self.directions(run.contender.budget, ranks))
        drawn = random_start(ranks, run.seed, self.max_rank)
        if kind == "gora+start":
            return gradient_start(drawn, ranks, self.gradients(self.probe_of(run.seed)), scales)
        return drawn

    def directions(self, budget: str, ranks: Ranks) -> Mapping[str, Tensor]:
        """EVA's start: leading directions of every site's inputs."""
        if budget not in self._directions:
            spectra = self.probed(0).spectra
            plan = plan_of(dict(ranks), spectra)
            batches = [{n: b[n] for n in ("input_ids", "attention_mask")} for b in self.probed(0).batches]
            found = input_directions(self.material.model, plan, batches)
            self._directions[budget] = {path: rows.cpu() for path, rows in found.items()}
        return self._directions[budget]

    def steps(self, contender: Contender, extra: int) -> int:
        """Optimizer steps; `uniform+compute` gets the probe's, `static@…` as many as take the schedule's time."""
        steps = self.config.steps
        if contender.arm == "uniform+compute":
            return steps + extra
        return self.timed_steps.get(contender.arm, steps)

    def schedule(self, run: Run, steps: int, replay: str | None) -> Bound | None:
        """The run's schedule over the sites that train. replay: the text of what another run chose."""
        if self.config.kind != "phases":
            return None
        form = schedule_of(run.contender.arm, steps, run.seed) if replay is None else parse_schedule(replay)
        ranks = self.ranks(run.contender, run.seed)
        trained = {site.path: site for site, rank in ranks.items() if rank}
        return None if form is None else bind(form, trained, run.seed)

    def arm(self, run: Run, steps: int, order: Sequence[int], replay: str | None = None) -> Arm:
        """Everything about one run but what it shares with those that train beside it. What a schedule chooses on the
        way is not known yet."""
        ranks = self.checked_ranks(run.contender, run.seed)
        scales = self.scales(run, ranks)
        schedule = self.schedule(run, steps, replay)
        active = None if schedule is None or isinstance(schedule, BoundNorm) else schedule.active
        return Arm(self.start(run, ranks, scales), scales, run.learning_rate, order, active)
