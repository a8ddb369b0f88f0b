"""Data sets → Examples, one file per form of rows.

In: a path and a task; out: `Examples`, with what was left out and what was changed. `table`: the sources, their
official files and readers (a new source is a row there); `load`: which file a path means, read as options say;
`official`: download, unpack; `rows`: CSV, TSV, JSON, parquet by line; `slots`: where images go; the rest: readers.
"""
