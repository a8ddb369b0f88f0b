"""`rankwise ranks` against what people use for spectra today, on 7B-sized matrices, in one run on the same cores.

    python benchmarks/ranks.py [--layers 2] [--dtype bfloat16] [--work DIR] [--out benchmarks/results]

Peers get the delta in memory as a present; rankwise's figure contains reading both files, the subtraction, the
exact norm, the sketch with its certificate, the null edge and every fall-back to the exact path.
Writes a Markdown table and the raw numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from rankwise.core.measure import OVERSAMPLE, exact_spectrum, range_basis
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum
from rankwise.options.commands import RanksConfig
from rankwise.options.sections import SitesSection, SpectrumSection
from rankwise.ranks.probe import open_pair
from rankwise.ranks.spectra import measure_site

HIDDEN, MLP, KV = 3584, 18944, 512  # Qwen2.5-7B
UP_TO, THRESHOLD = 128, 0.9
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
LAYER_ENTRIES = {"7B (28 layers of these)": 28 * sum(m * n for m, n in SHAPES.values())}
LAYER_ENTRIES["70B (80 layers: 8192, 28672, kv 1024)"] = 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192)


def planted(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A delta with 24 to 64 strong directions over white noise that holds about 5 % of the energy."""
    m, n = shape
    rank = int(torch.randint(24, 65, (1,), generator=generator))
    strength = torch.logspace(0, -0.7, rank)
    low = (torch.randn(m, rank, generator=generator) * strength) @ torch.randn(rank, n, generator=generator)
    noise = torch.randn(m, n, generator=generator)
    return 1e-3 * (low / low.norm() + 0.23 * noise / noise.norm()) * (m * n) ** 0.5


def write_pair(folder: Path, layers: int, dtype: torch.dtype) -> None:
    """base/ and tuned/ as Hugging Face folders, one shard per layer."""
    generator = torch.Generator().manual_seed(0)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": HIDDEN,
        "intermediate_size": MLP, "num_attention_heads": 28, "num_key_value_heads": 4,
        "num_hidden_layers": layers, "vocab_size": 1024, "tie_word_embeddings": True,
    }  # fmt: skip
    maps: dict[str, dict[str, str]] = {"base": {}, "tuned": {}}
    for name in maps:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    for layer in range(layers):
        shards: dict[str, dict[str, Tensor]] = {"base": {}, "tuned": {}}
        for projection, shape in SHAPES.items():
            key = f"model.layers.{layer}.{projection}.weight"
            base = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
            shards["base"][key] = base
            shards["tuned"][key] = (base.float() + planted(shape, generator)).to(dtype)
        for name, tensors in shards.items():
            file = f"model-{layer:05d}.safetensors"
            save_file(tensors, str(folder / name / file))
            maps[name] |= dict.fromkeys(tensors, file)
    os.sync()  # or the disk still writes while the first sites are read
    for name, weight_map in maps.items():
        (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def timed(work: Callable[[], object]) -> tuple[float, object]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def threshold_rank(values: Tensor, energy: float) -> int:
    kept = values.double().square().cumsum(0) / energy
    return int((kept < THRESHOLD - 1e-12).sum()) + 1


def peers(delta: Tensor, energy: float) -> dict[str, tuple[float, int]]:
    """Name → (seconds, rank at the threshold)."""
    wide = delta if delta.shape[0] <= delta.shape[1] else delta.T.contiguous()
    tall = wide.T.contiguous()
    full_wide, svd_wide = timed(lambda: torch.linalg.svd(wide, full_matrices=False))
    full_tall, svd_tall = timed(lambda: torch.linalg.svd(tall, full_matrices=False))
    values_tall, values = timed(lambda: torch.linalg.svdvals(tall))
    gram, spectrum = timed(lambda: exact_spectrum(wide, energy))
    array = wide.numpy()
    sklearn, found = timed(lambda: randomized_svd(array, UP_TO, random_state=0))
    assert isinstance(spectrum, Spectrum)
    return {
        "torch.linalg.svd, wide (mergekit-style)": (full_wide, threshold_rank(svd_wide[1], energy)),  # type: ignore[index]
        "torch.linalg.svd, tall": (full_tall, threshold_rank(svd_tall[1], energy)),  # type: ignore[index]
        "torch.linalg.svdvals, tall": (values_tall, threshold_rank(values, energy)),  # type: ignore[arg-type]
        "Gram eigenvalues, float64": (gram, threshold_rank(spectrum.values, energy)),
        "scikit-learn randomized_svd": (sklearn, threshold_rank(torch.from_numpy(found[1].copy()), energy)),  # type: ignore[index]
    }


def gemm_rate(shape: tuple[int, int], width: int) -> float:
    """FLOP/s of the sketch's own multiplication on this machine, best of three."""
    left, right = torch.randn(shape), torch.randn(shape[1], width)
    return max(2 * shape[0] * shape[1] * width / timed(lambda: left @ right)[0] for _ in range(3))


def ideal_seconds(shape: tuple[int, int], item_bytes: int, read_rate: float) -> float:
    """Reading both matrices, and four multiplications with the sketch at the measured GEMM rate."""
    m, n = min(shape), max(shape)
    width = UP_TO + OVERSAMPLE
    return 2 * m * n * item_bytes / read_rate + 4 * 2 * m * n * width / gemm_rate((m, n), width)


def read_rate(folder: Path) -> float:
    """Bytes per second of plain reads of the same (cached) files."""
    files = [*folder.glob("base/*.safetensors"), *folder.glob("tuned/*.safetensors")]
    seconds, _ = timed(lambda: [file.read_bytes() for file in files[:1]])
    return files[0].stat().st_size / seconds


def run_command(folder: Path, layers: int) -> dict[str, float]:
    """The real command in a process of its own: seconds and peak RssAnon in MiB."""
    include = "|".join(rf"layers\.{i}\." for i in range(layers))
    command = [sys.executable, "-m", "rankwise.cli", "ranks", str(folder / "base"), str(folder / "tuned")]
    command += ["--include", include, "--out", str(folder / f"out{layers}"), "--no-plots", "--smoothing_factor", "0"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.01)
    assert process.wait() == 0, "rankwise ranks failed"
    return {"layers": layers, "seconds": time.perf_counter() - started, "peak_anonymous_MiB": peak / 1024}


def bench_dtype(folder: Path, layers: int, dtype: torch.dtype) -> dict[str, object]:
    pair_folder = folder / str(dtype).removeprefix("torch.")
    write_pair(pair_folder, layers, dtype)
    pair = open_pair(str(pair_folder / "base"), str(pair_folder / "tuned"), SitesSection(), [])
    config = RanksConfig(spectrum=SpectrumSection(max_rank=UP_TO))

    def question(_: Site, spectrum: Spectrum) -> object:
        return spectrum.rank_for(THRESHOLD, 1, UP_TO)

    rate = read_rate(pair_folder)
    rows = []
    for site in pair.sites.values():
        seconds, found = timed(lambda s=site: measure_site(s, pair.read(s), config, question))  # type: ignore[misc]
        spectrum = found.spectrum  # type: ignore[attr-defined]
        rows.append(
            {
                "site": site.path, "shape": site.shape, "seconds": seconds, "method": spectrum.method,
                "rank": spectrum.rank_for(THRESHOLD, 1, UP_TO),
                "ideal_seconds": ideal_seconds(site.shape, dtype.itemsize, rate),
            }
        )  # fmt: skip
        print(f"{dtype} {site.path}: {seconds:.2f} s, {spectrum.method}", flush=True)
    commands = [run_command(pair_folder, count) for count in dict.fromkeys((1, layers))]
    return {"dtype": str(dtype), "rows": rows, "commands": commands, "pair": pair}


def compare_with_peers(bench: dict[str, object]) -> list[dict[str, object]]:
    """One site of each shape through every peer."""
    pair, table, seen = bench["pair"], [], set()
    for row in bench["rows"]:  # type: ignore[attr-defined]
        if row["shape"] in seen:
            continue
        seen.add(row["shape"])
        delta = pair.read(pair.sites[row["site"]])  # type: ignore[attr-defined]
        mine = [r["seconds"] for r in bench["rows"] if r["shape"] == row["shape"]]  # type: ignore[attr-defined]
        for name, (seconds, rank) in peers(delta.matrix, delta.energy).items():
            same = rank == row["rank"]
            ratio = seconds / (sum(mine) / len(mine))
            table.append({"shape": row["shape"], "peer": name, "seconds": seconds, "ratio": ratio, "same_rank": same})
            print(f"{row['shape']} {name}: {seconds:.2f} s, {ratio:.1f}×, same rank: {same}", flush=True)
    return table


def layer_total(rows: list[dict[str, object]], peer: str, layers: int) -> float:
    """Seconds of a peer for all sites of the benchmark, from its time per shape."""
    per_shape = {tuple(row["shape"]): row["seconds"] for row in rows if row["peer"] == peer}  # type: ignore[arg-type]
    return layers * sum(per_shape[shape] for shape in SHAPES.values())  # type: ignore[misc]


def markdown(benches: list[dict[str, object]], table: list[dict[str, object]], layers: int) -> str:
    lines = [
        "# Spectra of 7B-sized deltas",
        "",
        f"{date.today()} · {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads · "
        f"torch {torch.__version__} · {layers} layers of Qwen2.5-7B's shapes · `python benchmarks/ranks.py`",
        "",
        "Peers by shape (first data type of the run); ratio = peer ÷ rankwise, whose time includes reading, "
        "subtraction, norm, certificate, null edge and fall-backs.",
        "",
        "| shape | peer | seconds | ratio | same rank at 90 % |",
        "|---|---|---:|---:|---|",
    ]
    for row in table:
        shape = "×".join(map(str, row["shape"]))  # type: ignore[call-overload]
        same = "yes" if row["same_rank"] else "no"
        lines.append(f"| {shape} | {row['peer']} | {row['seconds']:.2f} | {row['ratio']:.1f} | {same} |")
    own = sum(row["seconds"] for row in benches[0]["rows"])  # type: ignore[attr-defined]
    lines += [
        "",
        f"All {layers} layers: rankwise {own:.1f} s.",
        "",
        "| peer, all sites | seconds | ratio |",
        "|---|---:|---:|",
    ]
    for peer in dict.fromkeys(str(row["peer"]) for row in table):
        total = layer_total(table, peer, layers)
        lines.append(f"| {peer} | {total:.1f} | {total / own:.1f} |")
    lines += [
        "",
        "| data type | seconds | ÷ ideal | fall-backs | 1 layer: s, RssAnon | all layers: s, RssAnon | limit 3× |",
    ]
    lines += ["|---|---:|---:|---:|---|---|---:|"]
    for bench in benches:
        rows, commands = bench["rows"], bench["commands"]
        total = sum(row["seconds"] for row in rows)  # type: ignore[attr-defined]
        ideal = sum(row["ideal_seconds"] for row in rows)  # type: ignore[attr-defined]
        undecided = sum("undecided" in row["method"] for row in rows)  # type: ignore[attr-defined]
        cells = [f"{c['seconds']:.1f} s, {c['peak_anonymous_MiB']:.0f} MiB" for c in (commands[0], commands[-1])]  # type: ignore[index]
        limit = 3 * HIDDEN * MLP * 4 / 2**20
        lines.append(
            f"| {bench['dtype']} | {total:.1f} | {total / ideal:.2f} | {undecided} of {len(rows)} | "  # type: ignore[arg-type]
            f"{cells[0]} | {cells[1]} | {limit:.0f} MiB |"
        )
    per_entry = own / (layers * sum(m * n for m, n in SHAPES.values()))
    lines += [
        "",
        "Extrapolation, linear in the number of entries (measured seconds per entry × entries; same cores):",
        "",
    ]
    lines += [f"- {name}: {per_entry * entries / 60:.1f} minutes" for name, entries in LAYER_ENTRIES.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--work", type=Path, help="folder for the synthetic checkpoints [a temporary one]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    range_basis(torch.randn(64, 256), 16, 1, None)  # warm up the linear algebra library
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        benches = [bench_dtype(Path(work), options.layers, getattr(torch, name)) for name in options.dtype]
        table = compare_with_peers(benches[0])
    text = markdown(benches, table, options.layers)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ranks.md").write_text(text)
    raw = {"peers": table, "runs": [{k: v for k, v in b.items() if k != "pair"} for b in benches]}
    (options.out / "ranks.json").write_text(json.dumps(raw, indent=1))
    print(text)


if __name__ == "__main__":
    main()
