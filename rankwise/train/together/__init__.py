"""Many small training runs at once, equal to one after the other; also what `study` trains with.

In: arms (start, scales, rate, order of rows, phases) on one frozen base. Out: their trained factors and losses.
`train.py` trains and scores them, `stacked.py` holds their factors and AdamW in one matrix each, `alone.py` trains what
cannot share a stack: phases that are chosen on the way, and all weights.
"""
