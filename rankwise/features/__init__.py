"""Low-rank factors of visual features, predicted by a network in one pass, against the SVD of every single matrix.

In: pictures and a model (or synthetic matrices). Out: a feature cache, trained networks, tables of errors and costs.
A command a file, to be read first: `capture.py`, `train.py`, `compare.py`, `show.py`, `downstream.py`.
The cache on the disk: `cache.py`, `cache_writer.py`, what goes in: `pictures.py`, `encoder.py`, `synthetic.py`; who
trains on what: `dataset.py`. A network: `nets/`, its loss: `objective.py`, its files: `trained.py`. The baselines:
`approximation.py`; every error and cost: `measures.py`; in words, tables and plots: `page.py`, `downstream_page.py`.
"""
