"""Saving and restoring the state of a run: tensors and text only, nothing that runs code.

store    folders of files that are complete or not there, the newest two of them kept
state    what of a Learner they hold, and putting it back, strictly
weights  a network's tensors in one file
"""
