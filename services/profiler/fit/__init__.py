"""Fits cost profiles to measured tables of operators, and says how far off they are.

``source`` reads tables, ``tables`` answers from them, ``layer`` and ``attention`` make the terms of
the step model, ``overheads`` adds what engines add, ``build`` writes profiles, ``validate`` judges.
"""
