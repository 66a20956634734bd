"""The rules that judge the paper's claims: one module per experiment, functions from a run to findings.

The first paragraph of each rule's docstring is the rule as the report prints it.
"""
