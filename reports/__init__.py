"""The report of runs, made from their tables: one section per experiment, discovered by its name.

The variable CATS_REPORTS names further folders (separated as in PATH) that hold sections.
"""

import os

__path__.extend(folder for folder in os.environ.get("CATS_REPORTS", "").split(os.pathsep) if folder)
