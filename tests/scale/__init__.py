"""How much one server carries: many models and checkpoints at rest, many small calls, many callers.

    PYTHONPATH=tests python -m scale [ROW ...]

Servers are real processes with their production wiring; what they have was written by the journal's
and the catalogue's own code. docs/scale.md says what came of it.
"""
