"""What runs have left, for people: one page of a run, several runs compared, the model card and its upload.

In: run folders. Out: report.html and report.md (`report.py`), comparison.* (`compare.py`), README.md (`card.py`).
`contents.py` reads whatever a run folder holds, by the rooms' readers; `sections.py` puts the rooms' blocks in order of
time, `scores.py` shows what `evaluate` left, `card_facts.py` has the card's lines. How a result looks is its room's.
"""
