"""up: ``|u_j| >= t``, arXiv 2505.17701 (M-COUNTDOWN): the up product is read whole and decides."""

from cats.criteria.base import Criterion


class Up(Criterion):
    name, title, source = "up", "up", "arXiv 2505.17701"
    sites = ("up",)
    decider = "up"


CRITERION = Up()
