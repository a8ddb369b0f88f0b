"""How anything is shown: values in, text, HTML and pictures out; no noun of the project.

`text`: durations, sizes, aligned columns; `terminal`: what a terminal can print. `blocks`: tables, plots and words, in
which a room describes a result once, and their lines for a terminal; `template`: a page of them in Markdown or HTML;
`canvas`: the style of plots.
"""
