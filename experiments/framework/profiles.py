"""A profile (TOML) becomes one `Config` for each experiment, validated whole before any work."""

import importlib
import pkgutil
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import experiments
from experiments.framework.config import Config
from experiments.framework.options import Count, OneOf, Seed, parse, to_json

PROFILES = Path(__file__).parents[1] / "profiles"
DTYPES = ("auto", "float32", "float16", "bfloat16")


def discover(folders: Iterable[str]) -> dict[str, str]:
    """Experiments in ``folders``: ``e01`` and so on -> module or package. Raises ImportError for two of one number."""
    modules: dict[str, str] = {}
    for module in pkgutil.iter_modules(folders):
        if not re.fullmatch(r"e\d\d_\w+", module.name):
            continue
        number, name = module.name.split("_")[0], f"experiments.{module.name}"
        if number in modules:
            raise ImportError(f"{modules[number]} and {name} are both experiment {number}: rename one of them")
        modules[number] = name
    return dict(sorted(modules.items()))


EXPERIMENTS = discover(experiments.__path__)
"""``e01`` and so on -> module or package; one file or folder each, found by its name."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """A profile's ``[data]``: where text and task data come from (see `experiments.data`).

    Attributes:
        source: ``pocket``, or ``hub`` for everything that `datasets.load_dataset` reads.
        path, name, data_files, revision: what it is given.
        split, heldout_split: to train and calibrate on, and never to.
        heldout_documents: set aside at the beginning where there is no ``heldout_split``.
        column: that holds the text.
        shuffle_buffer: documents held in memory to shuffle.
        folder: directory with the hub's names, instead of the hub.
    """

    source: Annotated[str, OneOf(("pocket", "hub", "folder"))] = "pocket"
    path: str | None = None
    name: str | None = None
    data_files: Any = None
    revision: str | None = None
    split: str | None = None
    heldout_split: str | None = None
    heldout_documents: Count | None = None
    column: str | None = None
    shuffle_buffer: Count | None = None
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.path is not None and self.split is None:
            raise ValueError(
                f"split is missing: a path but no split, name the part of {self.path} to read, such as split = 'train'"
            )
        if self.path is None and self.source == "hub":
            raise ValueError("path is missing: source = 'hub' needs the name of a data set")


@dataclass(frozen=True, kw_only=True)
class Common:
    """What a profile says for all experiments; an experiment's own table may say otherwise for itself."""

    models: tuple[str, ...] = ("pocket",)
    device: str = "cpu"
    dtype: Annotated[str, OneOf(DTYPES)] = "float32"
    seed: Seed = 0
    data: Data = Data()


COMMON = tuple(Common.__dataclass_fields__)


def allowed_keys() -> list[str]:
    """Keys at the top of a profile."""
    return sorted({"description", *COMMON, *EXPERIMENTS})


def load_profile(name: str) -> dict[str, Any]:
    """Read a profile by name (pocket, laptop, small, paper) or from a TOML file of the same form.

    Raises:
        ValueError: no such profile, broken TOML, or an unknown key.
    """
    path = Path(name) if name.endswith(".toml") else PROFILES / f"{name}.toml"
    try:
        profile = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.toml")))
        raise ValueError(f"no profile {name!r}: allowed are {known}, or the path of a .toml file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    unknown = sorted(set(profile) - set(allowed_keys()))
    if unknown:
        raise ValueError(f"{path} has unknown keys {', '.join(unknown)}: allowed are {', '.join(allowed_keys())}")
    for key in ("data", *EXPERIMENTS):
        if not isinstance(profile.get(key, {}), dict):
            raise ValueError(f"{path}: {key} must be a table of options, [{key}], not {profile[key]!r}")
    return profile


def override(profile: dict[str, Any], assignment: str) -> None:
    """Apply ``e02.limit=50`` to a profile in place; the value is TOML, or a bare word.

    Raises:
        ValueError: it does not look like that. Whether the option exists, and may have the value, `make_config` says.
    """
    path, equals, value = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or keys[0] not in allowed_keys():
        raise ValueError(
            f"--set {assignment!r} must look like e02.limit=50, beginning with one of {', '.join(allowed_keys())}"
        )
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word is a string
    table = profile
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {assignment!r}: {key} is not a table")
    table[keys[-1]] = parsed


def apply_assignments(profile: dict[str, Any], assignments: Iterable[str]) -> None:
    """`override` with each; another ``data.path`` takes with it what the profile says of its own data set.

    Raises:
        ValueError: as `override`.
    """
    own = [one for one in assignments if one.partition("=")[0].strip() == "data.path"]
    if own:
        profile["data"] = {key: value for key, value in profile.get("data", {}).items() if key == "folder"}
    for assignment in assignments:
        override(profile, assignment)


def make_config(
    experiment: str, name: str, profile: Mapping[str, Any], output: Path, auto: str | None = None
) -> Config[Any]:
    """The `Config` of one experiment. An experiment's own table may override models, dtype, device and seed.

    With ``auto``, the device that the name auto stands for, neither the device nor the models need to be here: it is
    the `Config` of a run that was made elsewhere.

    Raises:
        ValueError: an unknown experiment or option, or a value that is not allowed: one sentence that names it.
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {experiment!r}: allowed are {', '.join(EXPERIMENTS)}")
    if experiment not in profile:
        raise ValueError(f"profile {name} has no table [{experiment}] with the options of this experiment")
    if not isinstance(profile[experiment], Mapping):
        raise ValueError(f"{experiment} must be a table of options, not {profile[experiment]!r}")
    table = dict(profile[experiment])
    own = {key: table.pop(key) for key in COMMON if key in table}
    given = {key: profile[key] for key in COMMON if key in profile}
    parse(Common, given, "")
    parse(Common, own, experiment)
    common = parse(Common, {**given, **own}, "")
    module = importlib.import_module(EXPERIMENTS[experiment])
    options = parse(module.Options, table, experiment)
    data = {key: value for key, value in asdict(common.data).items() if value is not None}
    if common.data.path is not None and "source" not in {**given, **own}.get("data", {}):
        data["source"] = "hub"
    return Config(
        experiment,
        name,
        output,
        device=_device(common.device) if auto is None else common.device.replace("auto", auto),
        dtype=common.dtype,
        seed=common.seed,
        models=_models(common.models) if auto is None else list(common.models),
        data=data,
        options=options,
        finished_only=auto is not None,
    )


def _device(name: str) -> str:
    from cats.structure import resolve_device

    return resolve_device(name, "sharded")


def _models(names: tuple[str, ...]) -> list[str]:
    """The names, if each can be one. Raises ValueError."""
    for name in names:
        if name == "pocket":  # importing what knows all others takes seconds
            continue
        from cats.models import resolve

        try:
            resolve(name)
        except RuntimeError as error:  # Path.expanduser, of a user that does not exist
            raise ValueError(f"the model {name!r} cannot be read as a path: {error}") from error
    return list(names)


def make_configs(
    chosen: Iterable[str],
    name: str,
    profile: Mapping[str, Any],
    output: Path,
    original: Mapping[str, Any],
    whole: bool = True,
    auto: str | None = None,
) -> list[Config[Any]]:
    """`make_config` of each of ``chosen``, after the tables of all others have been validated too.

    Args:
        chosen: experiments to run.
        name: of the profile.
        profile: with the command line's changes.
        output: run directory.
        original: the profile that runs of this name are expected to be of, for `Config.differs`.
        whole: validate the others.
        auto: as in `make_config`.

    Raises:
        ValueError: as `make_config`.
    """
    configs = {one: make_config(one, name, profile, output, auto) for one in chosen}
    for one in EXPERIMENTS:
        if whole and one in profile and one not in configs:
            make_config(one, name, profile, output)
    for config in configs.values():
        config.differs = differences(config, name, original, auto)
    return list(configs.values())


def differences(
    config: Config[Any], name: str, original: Mapping[str, Any], auto: str | None = None
) -> dict[str, list[Any]]:
    """Settings in which ``config`` differs from the profile ``original``: key -> [the profile's, the run's]."""
    if config.experiment not in original:
        return {config.experiment: ["not in the profile", "measured"]}
    expected = _flat(make_config(config.experiment, name, original, config.output, auto).settings())
    actual = _flat(config.settings())
    keys = sorted(key for key in {*expected, *actual} if expected.get(key) != actual.get(key))
    return {key: [expected.get(key), actual.get(key)] for key in keys}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": to_json(value)}
    return flat
