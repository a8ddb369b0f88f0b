"""Spectra of a layer's experts against LAPACK on each, Qwen3-30B-A3B's shapes, in one run on the same cores.

    python benchmarks/experts_speed.py [--experts 128] [--group 16] [--layers 2] [--work DIR] [--out benchmarks/results]

128 experts of 1536 × 2048 (gate and up) and 2048 × 768 (down). Rankwise's figure contains reading both checkpoints,
the subtraction, exact norms, the sketches with their certificates, null edges and every fall-back; it is taken in
groups of experts, and between the groups every peer runs on one expert whose delta it gets in memory as a present. A
peer's figure for the layer is its median per expert times their number. RssAnon is the real command's, of one layer
and of all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise.core.measure import Delta, exact_spectrum
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum
from rankwise.options.commands import RanksConfig
from rankwise.options.sections import SitesSection, SpectrumSection
from rankwise.ranks.deltas import CheckpointPair
from rankwise.ranks.expert_spectra import measure_experts
from rankwise.ranks.measured import Measured
from rankwise.ranks.probe import open_pair
from rankwise.ranks.spectra import site_generator

HIDDEN, INNER = 2048, 768  # Qwen3-30B-A3B: 48 layers of 128 experts
LAYERS, EXPERTS = 48, 128
UP_TO, THRESHOLD = 128, 0.9
CHECKED = (1, 16, 64, 128)  # ranks whose certified interval is compared with the true energy
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
LIMIT = 3 * 4 * 2 * INNER * HIDDEN / 2**20 + 200  # MiB of RssAnon: three experts' float32 gate and up, and 200
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": HIDDEN, "vocab_size": 512,
    "intermediate_size": 6144, "moe_intermediate_size": INNER, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "norm_topk_prob": True,
}  # fmt: skip


def delta(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Like those of full fine-tuning, where 90 % of the energy was at 46 % of full rank (a real pair's largest layer):
    512 directions with energies as 1/i over white noise with 0.7 of theirs put it at 45 to 58 %. One expert moved up to
    three times as far as another."""
    m, n = shape
    strength = torch.arange(1, 513) ** -0.5
    low = (torch.randn(m, 512, generator=generator) * strength) @ torch.randn(512, n, generator=generator)
    noise = torch.randn(m, n, generator=generator)
    size = 10 ** (-0.5 * float(torch.rand(1, generator=generator)))
    return 2e-3 * size * (low / low.norm() + 0.85 * noise / noise.norm()) * (m * n) ** 0.5


def write_pair(folder: Path, layers: int, experts: int) -> None:
    """base/ and tuned/ in bfloat16, a file per expert's matrix and a shard per layer, as Qwen's are."""
    generator = torch.Generator().manual_seed(0)
    maps: dict[str, dict[str, str]] = {"base": {}, "tuned": {}}
    for name in maps:
        (folder / name).mkdir(parents=True)
        config = CONFIG | {"num_hidden_layers": layers, "num_experts": experts}
        (folder / name / "config.json").write_text(json.dumps(config))
    for layer in range(layers):
        shards: dict[str, dict[str, Tensor]] = {"base": {}, "tuned": {}}
        for expert in range(experts):
            for projection, shape in SHAPES.items():
                key = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                base = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
                shards["base"][key] = base
                shards["tuned"][key] = (base.float() + delta(shape, generator)).bfloat16()
        for name, tensors in shards.items():
            file = f"model-{layer:05d}.safetensors"
            save_file(tensors, str(folder / name / file))
            maps[name] |= dict.fromkeys(tensors, file)
    os.sync()  # or the disk still writes while the first experts are read
    for name, weight_map in maps.items():
        (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@dataclass(frozen=True)
class Group:
    """Some of a layer's experts as a source of their own."""

    pair: CheckpointPair
    first: int
    sites: dict[str, Site]
    description: str = ""

    def read(self, site: Site) -> Delta:
        return self.pair.read(site)

    def expert(self, site: Site, expert: int) -> Delta:
        return self.pair.expert(site, self.first + expert)

    def prefetch(self, site: Site, expert: int = 0) -> None:
        self.pair.prefetch(site, self.first + expert)


@dataclass(frozen=True)
class Seconds:
    """Of the clock, and of the processor: the second is what others on the same cores change least."""

    wall: float
    cpu: float


def timed(work: Callable[[], Any]) -> tuple[Seconds, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), result


def question(_: Site, spectrum: Spectrum) -> object:
    return spectrum.rank_for(THRESHOLD, 1, UP_TO)


def gram32(matrix: Tensor) -> Tensor:
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(wide @ wide.T)


def tall(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T.contiguous()


PEERS: dict[str, Callable[[Delta], Any]] = {
    "torch.linalg.svdvals": lambda delta: torch.linalg.svdvals(tall(delta.matrix)),
    "Gram + eigvalsh, float64": lambda delta: exact_spectrum(delta.matrix, delta.energy),
    "Gram + eigvalsh, float32": lambda delta: gram32(delta.matrix),
}


def compare(pair: CheckpointPair, site: Site, experts: int, group: int) -> dict[str, Any]:
    """The whole parameter by rankwise, group after group, and between them one expert by every peer."""
    config = RanksConfig(spectrum=SpectrumSection(max_rank=UP_TO))
    own, rows, peers = list[Seconds](), list[Measured](), {name: list[Seconds]() for name in PEERS}
    wrong = 0
    for first in range(0, experts, group):
        part = replace(site, experts=min(group, experts - first))
        source, draw = Group(pair, first, {site.path: part}), site_generator(site, first)
        seconds, found = timed(lambda s=source, p=part, d=draw: measure_experts(s, p, config, question, d))
        own.append(seconds)
        rows += found.experts
        one = pair.expert(site, first)
        for name, work in PEERS.items():
            seconds, values = timed(lambda w=work, d=one: w(d))
            peers[name].append(seconds)
            if isinstance(values, Spectrum):
                wrong += not bounded(found.experts[0].spectrum, values)
        shown = ", ".join(f"{name} {each[-1].wall:.2f}" for name, each in peers.items())
        print(f"{site.projection} {first}: {own[-1].wall:.2f} s, {shown}", flush=True)
    wall, cpu = sum(each.wall for each in own), sum(each.cpu for each in own)
    return {
        "site": site.path, "shape": site.shape, "experts": experts, "seconds": wall, "cpu_seconds": cpu,
        "groups": [asdict(each) for each in own], "methods": list(dict.fromkeys(row.spectrum.method for row in rows)),
        "outside_bounds": wrong, "peers": {name: summary(each, experts) for name, each in peers.items()},
    }  # fmt: skip


def summary(seconds: list[Seconds], experts: int) -> dict[str, Any]:
    """Per expert, and what the layer would take."""
    median = statistics.median(each.wall for each in seconds)
    cpu = statistics.median(each.cpu for each in seconds)
    rows = [asdict(each) for each in seconds]
    return {"per_expert": rows, "median": median, "layer": median * experts, "cpu_layer": cpu * experts}


def bounded(found: Spectrum, exact: Spectrum) -> bool:
    """Whether the certified interval of every E(k) holds the true one."""
    return all(
        found.energy(k).low - 1e-6 <= exact.energy(k).low <= found.energy(k).high + 1e-6 for k in (1, 16, 64, 128)
    )


def anonymous(pid: int) -> float:
    """MiB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0.0)


def run_command(folder: Path, layers: int) -> dict[str, float]:
    """The real command in a process of its own: seconds and peak RssAnon in MiB."""
    include = "|".join(rf"layers\.{i}\.mlp\.experts" for i in range(layers))
    command = [sys.executable, "-m", "rankwise.cli", "ranks", str(folder / "base"), str(folder / "tuned")]
    command += ["--include", include, "--out", str(folder / f"out{layers}"), "--no-plots", "--allow_unmatched"]
    started, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.01)
    assert process.wait() == 0, "rankwise ranks failed"
    return {"layers": layers, "seconds": time.perf_counter() - started, "peak_anonymous_MiB": peak}


def imports_only() -> float:
    """RssAnon in MiB of a process that has imported what the command imports, and has computed one small product."""
    code = (
        "import rankwise.ranks.command, rankwise.ranks.probe, torch, sys; torch.randn(64, 64) @ torch.randn(64, 64); "
        "from transformers import Qwen3MoeForCausalLM; print(open('/proc/self/status').read())"
    )
    status = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def markdown(content: dict[str, Any]) -> str:
    rows, memory = content["sites"], content["memory"]
    own, cpu = sum(row["seconds"] for row in rows), sum(row["cpu_seconds"] for row in rows)
    lines = [
        "# Spectra of a layer's experts",
        "",
        f"{content['date']} · {content['machine']}, {content['threads']} threads, load {content['load'][0]:.1f} before "
        f"and {content['load'][1]:.1f} after · torch {content['torch']} · `python benchmarks/experts_speed.py`",
        "",
        f"{rows[0]['experts']} experts of Qwen3-30B-A3B's shapes, bfloat16 files with one matrix each. Deltas: 512 "
        "directions with energies as 1/i, over white noise with 0.7 of theirs; sizes of experts up to three times "
        f"apart. Question: the rank for {THRESHOLD:.0%} of the energy within {UP_TO}. Rankwise's time "
        "contains reading, subtraction, norms, certificates, null edges and fall-backs. A peer's is its median over "
        f"{len(rows[0]['groups'])} experts, measured between rankwise's groups, times the number of experts.",
        "",
        "| parameter | rankwise, s | peer | s per expert (median, range) | s per layer | ratio |",
        "|---|---:|---|---|---:|---:|",
    ]
    for row in rows:
        for name, peer in row["peers"].items():
            walls = [each["wall"] for each in peer["per_expert"]]
            shape = "×".join(map(str, row["shape"]))
            span = f"{peer['median']:.3f} ({min(walls):.3f} to {max(walls):.3f})"
            lines.append(
                f"| {row['experts']} × {shape} | {row['seconds']:.1f} | {name} | {span} | {peer['layer']:.1f} | "
                f"{peer['layer'] / row['seconds']:.1f} |"
            )
    lines += ["", "| the whole layer | s | ratio | processor, s | ratio |", "|---|---:|---:|---:|---:|"]
    lines.append(f"| rankwise | {own:.1f} | 1 | {cpu:.1f} | 1 |")
    for name in PEERS:
        wall, used = (sum(row["peers"][name][key] for row in rows) for key in ("layer", "cpu_layer"))
        lines.append(f"| {name} | {wall:.1f} | {wall / own:.1f} | {used:.1f} | {used / cpu:.1f} |")
    methods = sorted({each for row in rows for each in row["methods"]})
    outside = sum(row["outside_bounds"] for row in rows)
    lines += [
        "",
        f"Paths taken: {', '.join(methods)}. True energies outside their certified interval: {outside} of "
        f"{sum(len(row['groups']) for row in rows)} experts that were also measured exactly.",
        "",
        f"| the command | s | peak RssAnon, MiB | beyond the imports' {content['imports_MiB']:.0f} MiB | limit |",
        "|---|---:|---:|---:|---:|",
    ]
    for run in memory:
        beyond = run["peak_anonymous_MiB"] - content["imports_MiB"]
        lines.append(
            f"| layers: {run['layers']} | {run['seconds']:.0f} | {run['peak_anonymous_MiB']:.0f} | {beyond:.0f} | "
            f"{LIMIT:.0f} |"
        )
    experts = rows[0]["experts"]
    lines += [
        "",
        f"Limit: 3 × one expert's float32 gate and up (12.6 MB) + 200 MB. Extrapolation to all {LAYERS} layers of "
        f"{EXPERTS} experts, linear in the experts ({own / experts:.3f} s measured per expert, same cores): "
        f"{own / experts * EXPERTS * LAYERS / 60:.0f} minutes; by svdvals "
        f"{sum(row['peers']['torch.linalg.svdvals']['median'] for row in rows) * EXPERTS * LAYERS / 3600:.1f} hours.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--group", type=int, default=16, help="experts between two runs of the peers")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for the synthetic checkpoints [a temporary one]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        folder = Path(work)
        write_pair(folder, options.layers, options.experts)
        asked = SitesSection(include=r"layers\.0\.mlp\.experts", allow_unmatched=True)
        pair = open_pair(str(folder / "base"), str(folder / "tuned"), asked, [])
        sites = [compare(pair, site, options.experts, options.group) for site in pair.sites.values()]
        memory = [run_command(folder, layers) for layers in dict.fromkeys((1, options.layers))]
    content = {
        "date": str(date.today()), "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "load": [load, os.getloadavg()[0]], "sites": sites, "memory": memory,
        "imports_MiB": imports_only(),
    }  # fmt: skip
    text = markdown(content)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "experts_speed.md").write_text(text)
    (options.out / "experts_speed.json").write_text(json.dumps(content, indent=1))
    print(text)


if __name__ == "__main__":
    main()
