"""TEAL: ``|x_i| >= t`` on the inputs of linear layers, arXiv 2408.14690; for the down projection x is ``a u``.

The same sparsity everywhere (TEAL's greedy choice of one per projection is not part of this)."""

from cats.criteria.base import Criterion


class Teal(Criterion):
    name, title, source = "teal", "TEAL", "arXiv 2408.14690"
    sites = ("mlp_linears",)
    other_sites = ("attention_linears",)
    decider = None
    no_kernel = "teal runs as masks only: skipping inputs, that is columns of weights, needs another kernel than ours"


CRITERION = Teal()
