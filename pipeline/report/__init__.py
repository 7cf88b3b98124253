"""`report(run, ...)`: one self-contained HTML page about a run or several, made from the files in their
folders.

The way of the data: `files.py` reads what is there, `glance.py` compares before with after,
`charts.py` lays out curves, `page.py` gathers everything for the template `report.html.jinja`.
Trains nothing, imports no torch and asks no network; the page needs none either.
"""

from pipeline.report.page import report

__all__ = ["report"]
