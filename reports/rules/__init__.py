"""The rules that judge the paper's claims: one module per experiment, functions from a run to findings.

The docstring of a rule is the rule as the report prints it.
"""
