"""How long commands take to begin: CPU seconds of `--help` and of `ranks` on a tiny pair, against `import torch`.

    python benchmarks/start.py [--runs 5]

CPU seconds of the process and its children, for another load on the machine stretches the clock, not these.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from statistics import median

PAIR = """
import sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
model = LlamaForCausalLM(LlamaConfig(**sizes))
model.save_pretrained(Path(sys.argv[1], "base"))
with torch.no_grad():
    for weight in model.parameters():
        weight += 0.01 * torch.randn_like(weight)
model.save_pretrained(Path(sys.argv[1], "tuned"))
"""
RANKWISE = [sys.executable, "-m", "rankwise"]
LINES = {
    "python alone": [sys.executable, "-c", "pass"],
    "import torch": [sys.executable, "-c", "import torch"],
    "rankwise --help": [*RANKWISE, "--help"],
    "rankwise ranks --help": [*RANKWISE, "ranks", "--help"],
    "rankwise train --help": [*RANKWISE, "train", "--help"],
    "rankwise --version -v": [*RANKWISE, "--version", "-v"],
    "rankwise ranks base tuned": [*RANKWISE, *"ranks base tuned --no_plots --budget uniform:4 -o out".split()],
}


def seconds(command: list[str], folder: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each; the median counts [5]")
    runs = parser.parse_args().runs
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", PAIR, folder], check=True, capture_output=True)
        found = {name: median(seconds(line, folder) for _ in range(runs)) for name, line in LINES.items()}
    torch = found["import torch"]
    print("| | CPU seconds | of `import torch` | beyond it |\n|---|---|---|---|")
    for name, spent in found.items():
        print(f"| {name} | {spent:.2f} | {spent / torch:.2f} | {spent - torch:+.2f} |")


if __name__ == "__main__":
    main()
