"""Many small training runs at once, equal to one after the other: `train --arms`, and what `study` and `advise` use.

In: arms (start, scales, rate, order of rows, phases) on one frozen base. Out: their trained factors and losses.
`train.py` trains and scores them, `stacked.py` holds their factors in one matrix, `optimizer.py` is AdamW over it,
`starts.py` is where they begin, `alone.py` trains what cannot share a stack (phases that are chosen on the way,
pictures, all weights), and `fit.py` trains and scores in one call. `train --arms`: `command.py` runs, `requested.py`
reads and refuses, `arm_batch.py` trains, `arm_folder.py` writes.
"""
