"""Runs the stages of `make test` in two lanes, and says how long each took and what was slow."""
