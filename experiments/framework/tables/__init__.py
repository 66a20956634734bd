"""Every table that experiments write and reports read: one class per table, one field per column, free of torch; a
module for each experiment.

A row is one measurement. An unmeasured value is None and an empty cell; a measurement that came out as NaN is NaN and
the cell ``nan``. `schema` describes all tables as ``results/results.schema.json``, which is generated:

    python -m experiments.framework.tables > results/results.schema.json

Columns that many tables share:

- ``model``: as the profile names it; ``weights``: ``pretrained`` or ``random`` (a control, or a shape without weights);
- ``criterion``: what decides which neurons are skipped (``cats.criteria``), ``dense`` for the unmodified model;
- ``variant``: a criterion at a level, such as ``cats-50``, or at ReLUfication's own sparsity, ``cats-matched``;
- ``condition``: why the row was measured: ``figure`` (a figure or table of the paper), ``growth`` (what happens beyond
  its conditions) or ``check`` (correctness);
- ``path``: what really ran: ``sparse kernel``, ``dense masked`` (all products, then a mask) or ``dense``;
- ``sparsity_target`` and ``sparsity_measured``: fractions of neurons in [0, 1].
"""

from experiments.framework.tables.e01 import HistogramRow, ThresholdRow
from experiments.framework.tables.e02 import ItemSample, TextSample, ZeroShotRow
from experiments.framework.tables.e03 import FinetuningRow, FinetuningSample, SparsityRow, SweepRow
from experiments.framework.tables.e04 import TaskFinetuningRow, TaskFinetuningSample, TaskSweepRow
from experiments.framework.tables.e05 import LatencyRow, LatencySample
from experiments.framework.tables.e06 import AmdahlRow, GreedyRow, ShareRow, ThroughputRow
from experiments.framework.tables.e07 import AttentionRow, AttentionSample, AttentionTextSample
from experiments.framework.tables.e08 import (
    CriterionRow,
    CriterionSample,
    CriterionSpeedRow,
    CriterionSpeedSample,
    CriterionTextSample,
)
from experiments.framework.tables.e09 import (
    QuantizationRow,
    QuantizationSample,
    QuantizationSpeedRow,
    QuantizationSpeedSample,
    QuantizationTextSample,
    QuantizationThroughputRow,
)
from experiments.framework.tables.row import (
    CONDITIONS,
    PATHS,
    SCHEMA_VERSION,
    WEIGHTS,
    Row,
    columns,
    file_name,
    pack_flags,
    pack_numbers,
    row_types,
    schema,
    to_csv,
)

__all__ = [
    "CONDITIONS",
    "PATHS",
    "SCHEMA_VERSION",
    "WEIGHTS",
    "AmdahlRow",
    "AttentionRow",
    "AttentionSample",
    "AttentionTextSample",
    "CriterionRow",
    "CriterionSample",
    "CriterionSpeedRow",
    "CriterionSpeedSample",
    "CriterionTextSample",
    "FinetuningRow",
    "FinetuningSample",
    "GreedyRow",
    "HistogramRow",
    "ItemSample",
    "LatencyRow",
    "LatencySample",
    "QuantizationRow",
    "QuantizationSample",
    "QuantizationSpeedRow",
    "QuantizationSpeedSample",
    "QuantizationTextSample",
    "QuantizationThroughputRow",
    "Row",
    "ShareRow",
    "SparsityRow",
    "SweepRow",
    "TaskFinetuningRow",
    "TaskFinetuningSample",
    "TaskSweepRow",
    "TextSample",
    "ThresholdRow",
    "ThroughputRow",
    "ZeroShotRow",
    "columns",
    "file_name",
    "pack_flags",
    "pack_numbers",
    "row_types",
    "schema",
    "to_csv",
]
