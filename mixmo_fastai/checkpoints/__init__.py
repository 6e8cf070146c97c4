"""Save and restore the state of a run: tensors and JSON only, no pickled code.

store            checkpoint folders, written atomically; the newest two are kept
state            save the state of a Learner, and restore it with strict checks
optimizer_state  convert the state of an optimizer to named tensors and back
weights          tensors of a network in one file
"""
