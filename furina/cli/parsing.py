"""A command is a dataclass whose fields are its options; YAML lies below what is typed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from furina.cli.wording import HelpFormatter, metavar, sentence, without_none
from furina.errors import ConfigurationError, suggestion

REQUIRED = {"required": True}
"""Metadata of a command's field that is an option although it has no default."""


@dataclass(kw_only=True)
class Command:
    """A subcommand: its docstring is its summary, its fields are its options, `run` does it.

    A field without a default is an argument by place, a list takes one value or more, and a field's
    metadata are further settings of `add_argument`.
    """

    example: ClassVar[str]

    def run(self, *rest: Any, **more: Any) -> None:
        """Do it, with the values of what `add_options` added beside the fields."""
        raise NotImplementedError

    @classmethod
    def name(cls) -> str:
        """Return the word that calls it."""
        return cls.__name__.lower()

    @classmethod
    def summary(cls) -> str:
        """Return what it does."""
        return str(cls.__doc__).rstrip(".")

    @classmethod
    def parser(cls, words: Sequence[str]) -> ArgumentParser:
        """Build the parser; `words` may decide which options there are (`--method`)."""
        parser = ArgumentParser(
            prog=f"furina {cls.name()}",
            description=f"{cls.summary()}\n\nexample:\n  {cls.example}",
            formatter_class=HelpFormatter,
            exit_on_error=False,
        )
        cls.add_options(parser, words)
        places = [action.dest.upper() for action in parser._actions if not action.option_strings]
        parser.usage = " ".join([parser.prog, "[options]", *places])
        return parser

    @classmethod
    def add_options(cls, parser: ArgumentParser, words: Sequence[str]) -> None:
        """Add an option for each field, those that commands share behind its own."""
        own = sorted(fields(cls), key=lambda field: field.name not in cls.__annotations__)
        for field, settings in _settings(cls, own):
            kind = without_none(settings["type"])
            if get_origin(kind) in (list, Sequence):
                (settings["type"],) = get_args(kind)
                settings |= {"nargs": "+", "metavar": metavar(settings["type"])}
                if "default" in settings:
                    settings["default"] = settings["default"] and [*settings["default"]]
            settings |= field.metadata
            name = _option(field.name)
            if settings.get("nargs") in ("*", "?") or not {"default", "required"} & {*settings}:
                del settings["metavar"]
                name = field.name
            elif kind is bool:
                settings = {"action": "store_true", "help": settings["help"]}
            parser.add_argument(name, **settings)

    @classmethod
    def call(cls, words: Sequence[str]) -> None:
        """Parse `words` and run; raises ConfigurationError for an unknown or mistyped option."""
        given = parse(cls.parser(words), words).as_dict()
        own = {field.name: given.pop(field.name) for field in fields(cls)}
        cls(**own).run(**given)


def add_group(
    parser: ArgumentParser,
    config: type,
    prefix: str = "",
    skip: Collection[str] = (),
    title: str = "fields of a config file",
) -> None:
    """Add one option per field of the dataclass `config`, with its docstring and default."""
    group = parser.add_argument_group(title)
    wanted = [field for field in fields(config) if field.name not in skip]
    for field, settings in _settings(config, wanted):
        group.add_argument(_option(field.name, prefix), **settings)


def _settings(
    config: type, wanted: Iterable[Field[Any]]
) -> Iterator[tuple[Field[Any], dict[str, Any]]]:
    """Yield each field of a dataclass with its type, help and default for `add_argument`."""
    hints, texts = get_type_hints(config), _field_docstrings(config)
    for field in wanted:
        hint = hints[field.name]
        settings = {"type": hint, "metavar": metavar(hint), "help": texts[field.name]}
        if field.default is not MISSING:
            settings["default"] = field.default
        elif field.default_factory is not MISSING:
            settings["default"] = field.default_factory()
        yield field, settings


def _option(field: str, prefix: str = "") -> str:
    return f"--{prefix}{field.replace('_', '-')}"


def _field_docstrings(config: type) -> dict[str, str]:
    from docstring_parser import parse_from_object

    texts = {}
    for ancestor in reversed(config.__mro__[:-1]):
        for parameter in parse_from_object(ancestor).params:
            text = " ".join((parameter.description or "").split())
            texts[parameter.arg_name] = text.replace("%", "%%")
    return texts


def parse(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Parse `words`; a YAML file given by --config comes first, so that what is typed wins.

    Raises ConfigurationError in one sentence, naming the nearest option where one is misspelt.
    """
    words = _joined([_known_option(word, parser) for word in words], "config")
    for path in option_values(words, "config"):
        _check_keys(path, parser)
    try:
        return parser.parse_args(sorted(words, key=lambda word: not word.startswith("--config=")))
    except ArgumentError as error:
        raise ConfigurationError(sentence(error, parser)) from error


def _known_option(word: str, parser: ArgumentParser) -> str:
    """Return `word` with its option spelt as the parser knows it (dashes and underscores alike)."""
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word.partition("=")
    known = [option for option in parser._option_string_actions if option.startswith("--")]
    bare = name.removeprefix("--")
    for spelling in (bare, bare.replace("_", "-"), bare.replace("-", "_")):
        if f"--{spelling}" in known:
            return f"--{spelling}{equals}{value}"
    raise ConfigurationError(
        f"{parser.prog} has no option {name}.{suggestion(name, known)} {_all_of(parser)}"
    )


def _all_of(parser: ArgumentParser) -> str:
    return f"`{parser.prog} --help` lists all."


def option_values(words: Sequence[str], name: str) -> list[str]:
    """Return the values that `words` gives to --name, in order."""
    start = f"--{name}="
    return [word.removeprefix(start) for word in _joined(words, name) if word.startswith(start)]


def _joined(words: Sequence[str], name: str) -> list[str]:
    """Return `words` with --name and its value as one of them."""
    flag, rest = f"--{name}", iter(words)
    return [f"{flag}={next(rest, '')}" if word == flag else word for word in rest]


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: one of the values would be ignored."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{key!r} is given twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; raises ConfigurationError where it is none."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{path} cannot be read as YAML: {reason}.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold options, one 'name: value' a line.")
    return content


def _check_keys(path: str, parser: ArgumentParser) -> None:
    known = {action.dest for action in parser._actions} - {"help", "config", "print_config"}
    groups = {name.partition(".")[0] for name in known if "." in name}
    for key in _keys(read_yaml(path)):
        if key in groups:
            raise ConfigurationError(f"{path}: {key} must hold options, one 'name: value' a line.")
        if key not in known:
            group = key.rpartition(".")[0]
            near = [name for name in known if name.rpartition(".")[0] == group] or known
            raise ConfigurationError(
                f"{path} has an unknown key {key!r}.{suggestion(key, near)} {_all_of(parser)}"
            )


def _keys(content: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{option}" for option in value)
        else:
            yield str(key)
