"""rankwise report: a run folder → one self-contained page, report.html, and report.md beside it.

rankwise report runs/demo
"""

from __future__ import annotations

from pathlib import Path

from rankwise.errors import UsageError
from rankwise.options.commands import ReportConfig
from rankwise.show.report import build_report


def run(config: ReportConfig) -> Path:
    """Write the page and say where it is."""
    page = build_report(run_folder(config), out_path(config), config.title)
    print(f"report: {page} and {page.with_suffix('.md').name}, {page.stat().st_size / 2**20:.1f} MiB")
    return page


def describe(config: ReportConfig) -> list[str]:
    folder = run_folder(config)
    return [f"read what {folder} holds", f"write {out_path(config) or folder / 'report.html'} and its Markdown twin"]


def run_folder(config: ReportConfig) -> Path:
    if not config.run:
        raise UsageError("report needs a run folder: rankwise report RUN")
    return Path(config.run)


def out_path(config: ReportConfig) -> Path | None:
    if config.out and Path(config.out).suffix not in (".html", ".htm", ""):
        raise UsageError(f"--out {config.out}: the page is HTML; give a name that ends in .html")
    return Path(config.out) if config.out else None
