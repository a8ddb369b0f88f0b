"""Labelled data sets: images go in, with a teacher to ask or labels that are there; a folder to train on comes out.

command.py   `label`, from its options to label.json      ask.py       a teacher's labels: trial, votes, cost
images.py    which images, their names, their originals   existing.py  labels of folders, CSV and JSON files
dataset.py   the folder: rows, stored pixels, split       teacher/     questions, client, answers, ledger, loopback
"""
