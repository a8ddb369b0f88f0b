"""rankwise compare: finished runs side by side, in one table and one picture.

rankwise compare runs/batch/e2e_attention runs/batch/e2e_mlp -o runs/comparison
"""

from __future__ import annotations

from pathlib import Path

from rankwise.errors import UsageError
from rankwise.files.atomic import write_json, write_text
from rankwise.options.commands import CompareConfig
from rankwise.show.comparison import CSV, JSON, MARKDOWN, PICTURE, markdown, plot_comparison, read_rows, table_text


def run(config: CompareConfig) -> Path:
    """Write the tables and, unless told not to, the picture; returns the folder."""
    rows = read_rows(check(config))
    folder = Path(config.output_dir)
    write_text(folder / CSV, table_text(rows))
    write_json(folder / JSON, {"runs": [row.record() for row in rows]})
    text = markdown(rows)
    write_text(folder / MARKDOWN, text)
    files = [CSV, MARKDOWN, JSON]
    if not config.no_plots:
        files.append(plot_comparison(rows, folder / PICTURE).name)
    print(text)
    print(f"{', '.join(files)} in {folder}")
    return folder


def check(config: CompareConfig) -> list[Path]:
    if len(config.runs) < 2:
        raise UsageError("compare needs two run folders at least: rankwise compare RUN RUN …")
    folders = [Path(run) for run in config.runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("compare: one run folder is named twice")
    return folders


def describe(config: CompareConfig) -> list[str]:
    folders = check(config)
    names = [CSV, MARKDOWN, JSON, *([] if config.no_plots else [PICTURE])]
    return [f"read {', '.join(map(str, folders))}", f"write {', '.join(names)} in {config.output_dir}"]
