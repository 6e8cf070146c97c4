"""The report: one self-contained HTML page about a trained run.

`findings` gathers what there is to say, `charts` draws it, `page` lays it out.
"""
