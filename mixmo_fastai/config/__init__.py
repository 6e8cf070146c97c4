"""Recipes and the names in them. Standard library only, so that commands start fast.

choices        names that users may type: mask kinds, data sets, networks, optimizers
library_names  names of the networks in timm and fastai, read without importing these
schema         strict reading of nested settings; TOML reading and writing
recipe         recipes: everything that defines a run
methods        display names of methods
resolve        data set, recipe and flags combined into one recipe
defaults       default network, epochs and image size
"""
