"""Studies: runs, ablations, their statistics and their report.

`lrkit.ablate` is the way in from Python, ``lrkit ablate`` from the command line. Words have one meaning each here:

- To *train* is one method on one task with one seed, which is a *run*: `lrkit.study.run`.
- A *study* is asked for as plain data (`lrkit.study.asked`) and laid out as a *plan* (`lrkit.study.plan`): a *row* is one
  method, a *cell* is one row on one task with one seed.
- To *run a cell* is to train in a worker, from its last checkpoint if there is one: `lrkit.study.worker`.
- To *execute* a plan is to run the cells that are missing, and to *measure* costs: `lrkit.study.execute`,
  `lrkit.study.cost`.
- *Files* are what a run writes and what is read back, one class for both: `lrkit.study.files`,
  `lrkit.study.study_file`. A *record* is a run's or a study's folder: `lrkit.study.checkpoints.Record` while it trains,
  `lrkit.study.records.read_study` for readers.
- To *compare* is to make numbers of a record (`lrkit.study.comparison`), and a *table* is their text
  (`lrkit.study.table`). The report is in `lrkit.study.report`.

The side that trains imports nothing of the side that reads: plan, cell, worker and run on the one, results, comparison,
table and report on the other. They meet in the files.
"""

from lrkit.study.power import seeds_needed

__all__ = ["seeds_needed"]
