"""``pocket``: the small model shipped with the package."""

from importlib.resources import files
from pathlib import Path

from cats.models.from_directory import DirectoryLoader
from cats.models.loader import Origin


def pocket_path() -> Path:
    """Directory of the shipped pocket model."""
    return Path(str(files("cats") / "pocket_model"))


class PocketLoader(DirectoryLoader):
    """A directory that is found by the word ``pocket``."""

    order = 0
    example = "pocket"

    def claims(self, spec: str) -> bool:
        return spec == "pocket"

    def resolve(self, spec: str) -> str:
        return str(pocket_path())

    def origin(self, spec: str) -> Origin:
        return self.origin_of(pocket_path(), "shipped with the package")


LOADER = PocketLoader()
