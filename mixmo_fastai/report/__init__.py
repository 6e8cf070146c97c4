"""The report: a self-contained HTML page about a trained run.

`report_data` collects the data, `charts` and `filters` plot it with `drawing`, `sections` and
`page` lay it out.
"""
