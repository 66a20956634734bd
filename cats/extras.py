"""Modules that need more than the package's own dependencies say in one sentence what is missing."""


def missing(module: str, extra: str, error: ImportError) -> ImportError:
    """What ``module`` raises when a package of the optional dependencies ``extra`` cannot be imported."""
    package = (error.name or "").partition(".")[0]
    needs = f"{module} needs the package {package}, which is not installed"
    return ImportError(f"{needs}: pip install 'cats-sparsity[{extra}]' brings it", name=error.name)
