"""Arranges ranks, environment and retries around the commands that a person would type.

`chain` says which commands a recipe needs and in what order, `experiment` runs them with NeMo-Run. Only `experiment`
imports NeMo-Run, and nothing here imports torch: the launcher has an environment of its own.
"""
