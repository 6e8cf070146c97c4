"""Train the network of a recipe in a run folder, and resume it.

prepare          load the data, build the Learner, choose open settings
train            train, evaluate, and write the run folder
ensemble         the networks of a run, one after another
schedule         one-cycle, fine-tuning and published step schedules, as functions
pretrained       pixel statistics of pretrained weights
history          callback that records the history of a run
checkpointing    callbacks that save checkpoints
run_callbacks    base class of callbacks that follow a run, such as loggers
state            the state of a Learner in a checkpoint, restored with strict checks
identity         check that a checkpoint belongs to a run
optimizer_state  the state of an optimizer as named tensors
resume           resume within an epoch
lr_find          learning-rate range test
threads          choice of the number of threads on a CPU, by timing steps
precision        choice of float32 or bfloat16 on a CPU, by timing both
trials           comparison of such settings, by a few steps of a copy
speed            estimate of the training time, from a few steps of a copy
advice           one line of advice from a run's history
failures         readable errors for out-of-memory and lost workers
"""
