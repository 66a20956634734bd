"""CATS: ``|act(g)_j| >= t``, arXiv 2404.08763, equations 3 to 5."""

from cats.criteria.base import Criterion


class Cats(Criterion):
    name, title, source = "cats", "CATS", "arXiv 2404.08763"


CRITERION = Cats()
