"""The report: a self-contained HTML page about a trained run.

`findings` collects the data, `charts` and `filters` plot it, `sections` and `page` lay it out.
"""
