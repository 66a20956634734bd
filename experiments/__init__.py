"""Experiments of the reproducibility suite: one module or folder ``eNN_name`` for each, discovered by its name.

The variable CATS_EXPERIMENTS names further folders (separated as in PATH) that hold such modules.
"""

import os

__path__.extend(folder for folder in os.environ.get("CATS_EXPERIMENTS", "").split(os.pathsep) if folder)
