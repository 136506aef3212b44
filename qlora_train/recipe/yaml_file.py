"""Reads a recipe's YAML 1.2 into plain values, records the line of each key for messages, and writes YAML.

Values are built from the parser's node tree, as that still has both of two duplicate keys and the line of
every key, so that all problems can be reported at once, with their lines.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from qlora_train.boundary import reason_of
from qlora_train.errors import RecipeError

KeyPath = tuple[str | int, ...]
Origin = tuple[int, str]  # (order in the report, text): (12, "recipe.yaml:12")

READ_PATHS: tuple[KeyPath, ...] = (
    ("model", "base"),
    ("model", "chat_template"),
    ("lora", "init_from"),
    ("data", "train"),
    ("data", "eval"),
)
# Values are bundled names unless they look like a path, with a suffix or a folder.
_NAME_OR_FILE: tuple[KeyPath, ...] = (("model", "chat_template"),)
_INSTEAD_OF: dict[KeyPath, KeyPath] = {
    ("training", "max_steps"): ("training", "epochs"),
    ("training", "epochs"): ("training", "max_steps"),
    ("training", "batch_size"): ("training", "gradient_accumulation_steps"),
    ("training", "gradient_accumulation_steps"): ("training", "batch_size"),
}
_AFTER_THE_FILE = 1_000_000  # overrides are reported last
_MAX_INTEGER_BITS = 64  # larger than any setting; Python refuses to print 4,300 digits
MAX_PROBLEMS = 100  # that are reported
_MAX_BYTES = 2**20  # of a recipe; the parser takes a thousand times as much memory
_MAX_VALUES = 10_000  # aliases may repeat a few lines billions of times
_MAX_DEPTH = 8  # deeper than any recipe; an alias inside its own anchor is endless


@dataclass
class Draft:
    """A recipe being read: values as written, the place of each key, and the problems found so far."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[tuple[KeyPath, str]] = field(default_factory=list)
    num_values: int = 0

    @classmethod
    def of_dict(cls, values: Mapping[str, Any], folders: Sequence[Path]) -> Draft:
        """The draft of nested values; `READ_PATHS` are searched in `folders`."""
        draft = cls(copy.deepcopy(dict(values)), {(): (0, "recipe")})
        draft._anchor_paths(folders)
        return draft

    @classmethod
    def of_file(cls, file: Path, folders: Sequence[Path]) -> Draft:
        """The draft of a YAML file. Raises `RecipeError` if it is no YAML mapping at all."""
        draft = cls(places={(): (0, str(file))})
        try:
            with file.open("rb") as opened:
                content = opened.read(_MAX_BYTES + 1)
            if len(content) > _MAX_BYTES:
                raise RecipeError([f"{file}: is larger than {_MAX_BYTES / 2**20:.0f} MiB, and no recipe"])
            node = _compose(content.decode("utf-8"))
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark is not None else ""
            raise RecipeError([f"{file}{line}: not valid YAML: {error.problem or error.context}"]) from error
        except (OSError, UnicodeDecodeError, YAMLError, RecursionError) as error:
            raise RecipeError([f"{file}: cannot be read: {error}"]) from error
        if node is not None and not isinstance(node, MappingNode):
            raise RecipeError([f"{file}: must be a mapping of sections such as `model:` and `data:`"])
        if node is not None:
            draft.values = draft._build(
                node, (), lambda n: (n.start_mark.line + 1, f"{file}:{n.start_mark.line + 1}")
            )
        draft._anchor_paths(folders)
        return draft

    def put(self, path: KeyPath, value: Any) -> None:
        """Set a value that follows from the file's place, whatever its text says."""
        self._holder(path)[path[-1]] = value

    def override(self, overrides: Iterable[str], folders: Sequence[Path]) -> None:
        """Apply `section.key=value` texts; later problems with these keys name the override."""
        written: set[KeyPath] = set()
        for number, text in enumerate(overrides):
            place = (_AFTER_THE_FILE + number, f"override {text}")
            name, equals, value_text = text.partition("=")
            path: KeyPath = tuple(name.strip().split("."))
            if not equals or not all(path):
                self.places[text,] = place
                self.problems.append(((text,), "is not section.key=value, such as training.epochs=2"))
            elif path in written:
                self.problems.append((path, "overridden twice"))
            else:
                written.add(path)
                self._replace(path, value_text, place, folders, written)

    def _replace(
        self, path: KeyPath, value_text: str, place: Origin, folders: Sequence[Path], written: set[KeyPath]
    ) -> None:
        """Parse the value of one override and replace the file's value."""
        for old in [p for p in self.places if p[: len(path)] == path]:
            del self.places[old]
        self.places[path] = place
        try:
            node = _compose(value_text)
            value = None if node is None else self._build(node, path, lambda _: place)
        except (YAMLError, RecursionError) as error:
            reason = getattr(error, "problem", None) or error
            self.problems.append((path, f"the value is not valid YAML: {reason}"))
            return
        rival = _INSTEAD_OF.get(path)
        if rival is not None and rival not in written and value is not None:
            self._holder(rival).pop(rival[-1], None)
        self._holder(path)[path[-1]] = _anchored(value, folders, path) if path in READ_PATHS else value

    def report(self) -> list[str]:
        """The problems as lines `place: key: message`, in the order of the file, overrides last."""
        found = sorted(
            ((self._place(path), _dotted(path), message) for path, message in self.problems), key=_order
        )
        lines = [
            f"{text}: {message}"
            if not key or text.startswith(f"override {key}")
            else f"{text}: {key}: {message}"
            for (_, text), key, message in found
        ]
        return [*lines[:MAX_PROBLEMS], *(["... and more"] if len(lines) > MAX_PROBLEMS else [])]

    def _place(self, path: KeyPath) -> Origin:
        known = (path[:length] for length in range(len(path), -1, -1))
        return next(self.places[prefix] for prefix in known if prefix in self.places)

    def _holder(self, path: KeyPath) -> dict[Any, Any]:
        """The mapping that holds `path`, made where it is missing."""
        holder: dict[Any, Any] = self.values
        for depth, name in enumerate(path[:-1], start=1):
            if holder.get(name) is None:
                holder[name] = {}
                self.places.setdefault(path[:depth], self._place(path))
            if not isinstance(holder[name], dict):
                self.problems.append((path, f"{_dotted(path[:depth])} is not a mapping, so it has no keys"))
                return {}
            holder = holder[name]
        return holder

    def _anchor_paths(self, folders: Sequence[Path]) -> None:
        for section, key in READ_PATHS:
            values = self.values.get(str(section))
            if isinstance(values, dict) and key in values:
                values[key] = _anchored(values[key], folders, (section, key))

    def _build(self, node: Node, path: KeyPath, place_of: Callable[[Node], Origin]) -> Any:
        """The plain value of a node; records the place of every key, and duplicates as problems. Raises
        `RecipeError` for more values than any recipe has."""
        self.num_values += 1
        if self.num_values > _MAX_VALUES:
            raise RecipeError([f"{place_of(node)[1]}: the recipe has more than {_MAX_VALUES:,} values"])
        if len(path) > _MAX_DEPTH:
            self.problems.append((path, "nested too deeply"))
            return None
        if isinstance(node, SequenceNode):
            return [self._item(item, (*path, index), place_of) for index, item in enumerate(node.value)]
        if not isinstance(node, MappingNode):
            return self._scalar(node, path)
        values: dict[Any, Any] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, ScalarNode) else "?"
            if name == "<<":
                self.places[*path, name] = place_of(key)
                self.problems.append(
                    ((*path, name), "merge keys are not part of YAML 1.2; write the keys out")
                )
                continue
            if name in values:
                again = place_of(key)[1]
                self.problems.append(((*path, name), f"duplicate key, written again at {again}"))
                continue
            values[name] = self._item(value, (*path, name), place_of, key)
        return values

    def _scalar(self, node: Node, path: KeyPath) -> Any:
        try:
            value = _CONSTRUCTOR.construct_object(node)
        except Exception as error:  # an unknown !tag, 2024-13-01 as a date, `!!bool x`
            reason = getattr(error, "problem", None) or reason_of(error)
            self.problems.append((path, f"is no plain value: {reason}"))
            return None
        try:
            return _whole(value)
        except ValueError as error:
            self.problems.append((path, f"is no plain value: {error}"))
            return None

    def _item(
        self, node: Node, path: KeyPath, place_of: Callable[[Node], Origin], marked: Node | None = None
    ) -> Any:
        self.places[path] = place_of(marked or node)
        return self._build(node, path, place_of)


def nearest(
    name: str, choices: Iterable[str], shown: Mapping[str, str] | None = None, *, closeness: float = 0.6
) -> str:
    """`; did you mean X?` for the closest of `choices` (shown as `shown[X]`), or nothing. closeness: the
    least share of letters that are the same, by difflib."""
    known = list(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=closeness)
    if not close and shown is None:
        close = [choice for choice in known if choice.startswith(name)]
    return f"; did you mean {shown[close[0]] if shown else close[0]}?" if close else ""


def show(value: Any) -> str:
    """A value as it looks in a recipe, short enough for a message."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _whole(value: Any) -> Any:
    """A scalar that can be printed and written to YAML. Raises ValueError for any other."""
    if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
        raise ValueError(f"a number of {value.bit_length():,} bits; the most are {_MAX_INTEGER_BITS}")
    return _whole_characters(value) if isinstance(value, str) else value


def _whole_characters(text: str) -> str:
    """The text with surrogate pairs joined: JSON writes a character beyond 16 bits as two escapes, which YAML
    reads separately. Raises ValueError for one surrogate alone."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise ValueError(f"{ascii(text)} holds half a character, which UTF-8 cannot write") from error


def _compose(text: str) -> Node | None:
    return YAML(typ="safe", pure=True).compose(text)


_CONSTRUCTOR = YAML(typ="safe", pure=True).constructor


def _anchored(value: Any, folders: Sequence[Path], path: KeyPath) -> Any:
    """A path, or the paths of data sources, made absolute if they exist in one of `folders`."""
    if isinstance(value, list | tuple):
        return [_anchored(item, folders, path) for item in value]
    if isinstance(value, dict):
        return {key: _anchored(item, folders, path) if key == "path" else item for key, item in value.items()}
    if not isinstance(value, str) or not value:
        return value
    if path in _NAME_OR_FILE and not any(mark in value for mark in "./\\"):
        return value
    try:
        wanted = Path(value).expanduser()
        found = next((folder / wanted for folder in folders if os.path.exists(folder / wanted)), None)
    except (RuntimeError, ValueError):  # ~nosuchuser, NUL, no bytes in this locale: the type check says so
        return value
    return value if found is None else os.path.abspath(found)


def _order(problem: tuple[Origin, str, str]) -> int:
    return problem[0][0]


def _dotted(path: KeyPath) -> str:
    """A key as text, such as `data.train[0].path`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]


def yaml_text(value: Any) -> str:
    """A plain value, such as one key's of a recipe, as YAML in the style of saved recipes."""
    text = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.width = 4096
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(value, text)
    return text.getvalue().removesuffix("\n...\n")  # the end of the document, written after a scalar
