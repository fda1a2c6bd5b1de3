"""Evaluations: a client of the HTTP API that asks a data set's questions, judges answers and reports.

Nothing here knows how a model computes: the room sees an address. The public face is `command.run_eval`
(`harmonium eval`, docs/evals.md).
"""
