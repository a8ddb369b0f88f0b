"""Labelled data sets: what is asked, which pictures, and the folder that is written."""
