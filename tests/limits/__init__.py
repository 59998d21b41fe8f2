"""The named limits of every server: a call at each, which passes, and one above it, which does not.

Servers are processes with their production wiring and small settings, so that what is above a limit
is quickly made. Which limits there are their own descriptors and settings say.
"""
