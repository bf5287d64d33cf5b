"""Faults at random moments of real runs, and the proof that none changed a bit of the result: see __main__.py."""
