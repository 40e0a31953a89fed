"""Jobs as recipes: a piece of work on a run, in plain JSON, that any machine with this code and the run's data can do
alone; and its result, which says whose it is.

    {"kind": "coalitions", "run": DIGEST, "execution": {...}, "decisions": {}, "work": {"members": [[0, 2]]},
     "digest": OF ALL THIS, "config": {...}}
    {"recipe": ITS DIGEST, "value": [...], "digest": OF BOTH}

The configuration only says how to come to the run, and ``run`` (:mod:`training.identity`) whether one has: so its paths
may be edited where data lie elsewhere. A recipe is a file NAME.json, its result NAME.result.json beside it; both have
their names from the digest, so the same work has the same name whoever asks for it, and a result is found again.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from training.build import Job, build
from training.execution import Execution
from utils.args import Config
from utils.awaited import ResultsMissing
from utils.digest import digest_json
from utils.errors import UsageError, choose
from utils.files import parse_json, read_bytes
from utils.recorded import recorded_fields
from utils.records import write_json
from utils.registry import JOBS, load

RESULT = ".result.json"
DIRECTIONS = ("dataset_path", "download", "deterministic")  # fields that change no numbers, and that a job needs
HINTS = typing.get_type_hints(Config)
KINDS = {"kind": str, "run": str, "execution": dict, "decisions": dict, "work": dict}


@dataclass(frozen=True)
class Recipe:
    """``kind``: one of ``JOBS``; ``work``: what that function takes, in JSON's own types; ``run``: the digest of the
    run; ``decisions``: those of its job."""

    kind: str
    run: str
    execution: Execution
    decisions: dict[str, list]
    work: dict[str, Any]
    config: Config

    @classmethod
    def of(cls, kind: str, job: Job, work: dict[str, Any]) -> Recipe:
        """Work on a run that is built here. One thread: recipes run side by side, and threads change no bits."""
        execution = dataclasses.replace(job.execution, threads=1)
        names = [f.name for f in dataclasses.fields(Config) if f.metadata["changes_results"]]
        config = Config(**{name: getattr(job.config, name) for name in (*names, *DIRECTIONS)})
        return cls(kind, job.identity["digest"], execution, job.decisions, work, config)

    @cached_property
    def essence(self) -> dict[str, Any]:
        """All that the result depends on."""
        return {name: getattr(self, name) for name in KINDS} | {"execution": vars(self.execution)}

    @cached_property
    def digest(self) -> str:
        """What the recipe is recognized by."""
        return digest_json(self.essence)

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.kind}-{self.digest[:16]}.json"

    def to_json(self) -> dict[str, Any]:
        """What its file holds."""
        directions = {name: getattr(self.config, name) for name in DIRECTIONS}
        return {**self.essence, "digest": self.digest, "config": self.config.changing_results() | directions}

    def same_run(self, other: Recipe) -> bool:
        """Whether both can work on one :meth:`job`."""
        return all(getattr(self, name) == getattr(other, name) for name in ("run", "execution", "decisions", "config"))

    def job(self, quiet: bool = True) -> Job:
        """The run, built anew. Raises :class:`UsageError` where it comes out as another."""
        job = build(dataclasses.replace(self.config, quiet=quiet), self.execution)
        if job.identity["digest"] != self.run:
            raise UsageError(
                "the data, files or settings here are other ones than those that the job is for: use the same code "
                "and data everywhere."
            )
        job.decisions.update(self.decisions)
        return job

    def result(self, job: Job) -> dict[str, Any]:
        """Do the work; what the file of its result holds."""
        value = load(JOBS, self.kind, "kind of job")(job, self.work)
        return {"recipe": self.digest, "value": value, "digest": digest_json([self.digest, value])}

    def value_of(self, text: str | bytes, source: str) -> Any:
        """The value of this recipe's result. Raises :class:`UsageError` where the text is damaged, or the result of
        another recipe; ``source`` says where it comes from."""
        try:
            record = parse_json(text)
            whole = record["digest"] == digest_json([record["recipe"], record["value"]])
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise UsageError(f"{source} is no result, or a damaged one")
        if record["recipe"] != self.digest:
            raise UsageError(f"{source} is the result of another recipe")
        return record["value"]


def parse_recipe(text: str | bytes, source: str) -> Recipe:
    """The recipe in a text. Raises :class:`UsageError` where it is damaged or none; nothing in it is executed, and all
    values are checked as those of ``--config`` are."""
    try:
        record = parse_json(text)
        parts = {name: record[name] for name in KINDS}
        fields, execution = dict(record["config"]), Execution(**record["execution"])
        whole = digest_json(parts) == record["digest"] and all(type(parts[k]) is kind for k, kind in KINDS.items())
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UsageError(f"{source} is no recipe, or a damaged one: the command that wrote it writes it again.")
    fields = recorded_fields(source, {"config": fields, "execution": {}}, HINTS)
    try:
        choose(JOBS, parts["kind"], "kind of job")
        return Recipe(**parts | {"execution": execution}, config=Config(**fields))
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file; :class:`UsageError` as of :func:`parse_recipe`."""
    return parse_recipe(read_bytes(path, "recipe"), str(path))


def done(text: str) -> str:
    """A result's text from a recipe's: what another process is sent and sends back."""
    recipe = parse_recipe(text, "the recipe")
    return json.dumps(recipe.result(recipe.job()), allow_nan=False)


# ---- a folder of recipes -----------------------------------------------------------------------------------


def result_path(path: Path) -> Path:
    """Where the result of the recipe in a file goes."""
    return path.with_name(path.stem + RESULT)


def recipes_in(folder: Path) -> list[Path]:
    """The files of its recipes, in order."""
    return sorted(path for path in folder.glob("*.json") if not path.name.endswith(RESULT))


def result_there(recipe: Recipe, path: Path) -> list[Any]:
    """[value] of the recipe in a file where its result is there, else []. Raises :class:`UsageError` where what is
    there is damaged or the result of another recipe."""
    result = result_path(path)
    if not result.exists():
        return []
    try:
        return [recipe.value_of(read_bytes(result, "result"), str(result))]
    except UsageError as error:
        raise UsageError(f"{error}: delete it, and the same command goes on.") from error


def collected(recipes: Sequence[Recipe], folder: Path) -> Iterator[tuple[int, Any]]:
    """(i, value of recipes[i]) of those whose results lie in the folder."""
    for i, recipe in enumerate(recipes if folder.is_dir() else ()):
        for value in result_there(recipe, folder / recipe.name):
            yield i, value


def hand_out(recipes: Sequence[Recipe], folder: Path) -> NoReturn:
    """Write recipes for others to run, and say so by :class:`ResultsMissing`. The folder then holds these, and those
    that are done; one that nobody needs any more goes."""
    wanted = {recipe.name: recipe for recipe in recipes}
    for path in recipes_in(folder):
        if path.name not in wanted and not result_path(path).exists():
            path.unlink()
    for name, recipe in wanted.items():
        if not _holds(folder / name, recipe):
            write_json(folder / name, recipe.to_json())
    raise ResultsMissing({folder: (len(wanted), len(recipes_in(folder)))})


def _holds(path: Path, recipe: Recipe) -> bool:
    """Whether the recipe is in the file already (with paths that somebody edited, perhaps)."""
    try:
        return path.exists() and read_recipe(path).digest == recipe.digest
    except UsageError:
        return False
