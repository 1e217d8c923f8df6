"""Sweeps a real engine step by step, and writes its cost profile.

``target`` opens an engine, ``ledger`` says what each of its steps computes, ``scenarios`` chooses
the steps worth timing and ``sweep`` times them by ``stopwatch``. ``fit`` finds the coefficients of
the cost model, ``assess`` says how well they predict, ``machine`` measures the machine, ``result``
writes it all.
"""
