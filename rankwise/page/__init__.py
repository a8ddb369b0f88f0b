"""How anything is shown: values in, text, HTML and pictures out; no noun of the project.

`text`: durations, sizes, aligned columns; `terminal`: what a terminal can print. `blocks`: tables, figures and notes
that render to terminal, Markdown and HTML; `template`: a page of them; `canvas`: the style of plots.
"""
