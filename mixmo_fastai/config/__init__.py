"""Recipes and the names in them. Standard library only, so that commands start fast.

choices        names that users may type: mask kinds, data sets, networks, optimizers
registered     look up the functions that the tables of `choices` name
library_names  names of the networks in timm and fastai, read without importing these
hub_names      names and paths after "hf:"
schema         strict reading of nested settings; TOML reading and writing
recipe         recipes: everything that defines a run
load           read recipes; change single settings
consistency    checks of settings that do not fit together
methods        display names of methods
resolve        data set, recipe and flags combined into one recipe
defaults       default network, epochs and image size
"""
