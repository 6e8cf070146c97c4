"""Studies: methods, seeds and training lengths, compared on the same test images.

plan     the runs of a study, read from a TOML file
execute  train them, several at a time, in ordinary run folders
results  means and spreads over seeds, and differences with intervals
tables   the results as Markdown
"""
