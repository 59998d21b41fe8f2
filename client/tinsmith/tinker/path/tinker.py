"""`import tinker` in a process that a program on this client started: it is bound there too."""

import importlib

import tinsmith.tinker

tinsmith.tinker.install()
importlib.import_module("tinker")
