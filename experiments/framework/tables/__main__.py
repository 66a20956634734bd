"""Prints the schema of all tables as JSON: ``results/results.schema.json``."""

import json

from experiments.framework.tables import schema

print(json.dumps(schema(), indent=1))
