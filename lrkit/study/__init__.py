"""Studies: runs, ablations, their statistics and their report.

`lrkit.ablate` is the way in from Python, ``lrkit ablate`` from the command line.

- `lrkit.study.run`: one method trained on one task.
- `lrkit.study.plan`: what a study is to run, from TOML or plain data.
- `lrkit.study.cell`: one run of a study, content-addressed and crash-safe.
- `lrkit.study.execute`: all of them, on an executor.
- `lrkit.study.cost`: time and memory against the base.
- `lrkit.study.records`, `lrkit.study.statistics`, `lrkit.study.report`: what came of it.
"""
