"""Data sets: where their images come from, and how they reach the network.

`sources` reads; a new data set is a module with one reading function, a line in
`sources.SOURCES` and a line in `mixmo_fastai.names.DATASETS`.
"""
