"""What runs have left, for people: one page of a run, several runs compared, the model card and its upload.

In: run folders. Out: report.html and report.md (`report.py`), comparison.* (`compare.py`), README.md (`card.py`).
`contents.py` reads whatever a run folder holds as plain values; `sections.py` and `scores.py` make the page's blocks of
it, `card_facts.py` the card's lines.
"""
