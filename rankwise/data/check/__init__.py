"""`rankwise check`: examine a data set before training, and report all bad samples at once.

In: rows, images, a model's processor. Out: check.json and bad_samples.jsonl; exit 3 where training would refuse a row.
`command`: run and describe, read first, then what is said of the findings; `examine`: images, tokens, labels of every
row; `comparison`: ids and pixels against the family's own `apply_chat_template`; `trial`: a few rows through the model.
"""
