"""Data sets and data loaders.

To add a data set, write a module with a function that reads it, and add one line each to
`sources.SOURCES` and `mixmo_fastai.config.choices.DATASETS`.
"""
