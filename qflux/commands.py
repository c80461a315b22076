"""The commands of the command line: their options, taken from the dataclasses, and what they do.

Every option is a field of a dataclass: its docstring is the help, its default the default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
from typing_extensions import Required, TypedDict
from tyro import conf

from qflux_kernels import BackendUnavailableError

from .inference.session import GenerationOptions, Session
from .inference.text import UNKNOWN
from .models.presets import PRESETS, make_config
from .text.data import TextSplit, load_dataset_text, load_text
from .text.ngrams import ngram_losses
from .text.vocabulary import (
    DEFAULT_BPE_SIZE,
    VOCABULARIES,
    BpeVocabulary,
    Vocabulary,
    make_vocabulary,
)
from .train.checkpoint import load_model
from .train.loop import NonFiniteLossError, train
from .train.options import TrackerName, TrainingOptions

USER_ERRORS = (ValueError, OSError, ImportError, BackendUnavailableError, NonFiniteLossError)


@dataclass(frozen=True)
class TextOptions:
    """What to train on and which network.

    Args:
        preset: network: "lm" is the recommended one, "flux" and "qfnn" are the documents'.
        data: text file, or folder of .txt files; None: the Shakespeare that comes with the package.
        dataset: instead of `data`, name of a Hugging Face dataset, or its folder.
        dataset_config: configuration of the dataset.
        text_column: column of the dataset that holds the text.
        vocabulary: what a token is: a byte, a character, or a frequent run of bytes.
        vocab_size: number of tokens of the vocabulary "bpe".
        vocabulary_file: GPT-2's vocab.json (beside merges.txt) or a tokenizer.json, instead of
            `vocabulary`.
        use_hebbian: the same as `learning` "hebbian".
    """

    preset: str = "lm"
    data: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    text_column: str = "text"
    vocabulary: str = "char"
    vocab_size: int = DEFAULT_BPE_SIZE
    vocabulary_file: str | None = None
    use_hebbian: bool = False

    def load(self) -> TextSplit:
        """The text of the file, the folder or the dataset."""
        if self.dataset is None:
            return load_text(self.data)
        if self.data is not None:
            raise ValueError("data and dataset cannot both be given")
        return load_dataset_text(self.dataset, self.dataset_config, column=self.text_column)

    def make_vocabulary(self, text: TextSplit) -> Vocabulary:
        """The vocabulary of that text, or the one in `vocabulary_file`."""
        if self.vocabulary_file is not None:
            return BpeVocabulary.read(self.vocabulary_file)
        # Characters of the held-out works need ids; their pairs must not be counted.
        source = text.text if self.vocabulary == "char" else "".join(text.train.values())
        return make_vocabulary(self.vocabulary, source, self.vocab_size)


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and where to.

    Args:
        model_path: folder that training wrote.
        output_dir: folder for the Hugging Face model, a new or an empty one.
        overwrite: replace what has the same names in a folder that is not empty; the model's own
            folder is never written to.
    """

    model_path: str
    output_dir: str
    overwrite: bool = False


def documentation(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass and of its bases say about each field."""
    found = {}
    for base in reversed(kind.__mro__):
        for parameter in docstring_parser.parse(base.__doc__ or "").params:
            # One description may be of several fields: "sigma_min, sigma_max: ...".
            for name in parameter.arg_name.split(","):
                found[name.strip()] = " ".join((parameter.description or "").split())
    return found


def flag(annotation: Any, text: str, shown: str, aliases: Sequence[str] = ()) -> Any:
    """A field's type as tyro reads it, with its help.

    An option that is not given is None in Python and absent here, so None is no value to type; a
    path is typed as text.
    """
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind not in (NoneType, Path)]
        annotation = Union[tuple(kinds)]  # noqa: UP007 (made at run time)
    argument = conf.arg(help=text, help_behavior_hint=shown, aliases=list(aliases))
    return Annotated[annotation, argument]


def flags(
    kind: type,
    *,
    without: Sequence[str] = (),
    aliases: Mapping[str, Sequence[str]] | None = None,
    choices: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """The fields of a dataclass as options; what they give is a dictionary of those that came.

    The record is made by the command and not by the parser, so that its own messages reach the
    user as they are.

    Args:
        kind: the dataclass.
        without: fields that have no option.
        aliases: further spellings, by field.
        choices: what a field may be, where its annotation does not say.
    """
    hints, texts, options = get_type_hints(kind), documentation(kind), {}
    # Those that have to be given come first.
    for field in sorted(fields(kind), key=lambda field: field.default is not MISSING):
        if field.name in without:
            continue
        required = field.default is MISSING
        annotation = hints[field.name]
        if choices and field.name in choices:
            annotation = Literal[tuple(choices[field.name])]
        option = flag(
            annotation,
            texts[field.name],
            "(required)" if required else f"(default: {_shown(field.default)})",
            aliases.get(field.name, ()) if aliases else (),
        )
        options[field.name] = Required[option] if required else option
    return _group(kind.__name__, (kind.__doc__ or "").split("\n")[0], options)


def network_flags() -> Any:
    """The fields of every preset's configuration as options, as `flags` does it.

    The defaults shown are the presets'. Where both families of models have a field, its help is
    that of the preset that is the default.
    """
    presets = {name: make_config(name, vocab_size=1) for name in PRESETS}
    preferred = sorted(presets, key=lambda name: name != TextOptions.preset)
    options = {}
    for config in (presets[name] for name in preferred):
        hints, texts = get_type_hints(type(config)), documentation(type(config))
        for field in fields(config):
            if field.name == "vocab_size" or field.name in options:
                continue
            values: dict[str, list[str]] = {}
            for name in preferred:
                if hasattr(presets[name], field.name):
                    value = _shown(getattr(presets[name], field.name))
                    values.setdefault(value, []).append(name)
            owners = "; ".join(f"{', '.join(names)}: {value}" for value, names in values.items())
            everywhere = [value for value, names in values.items() if len(names) == len(presets)]
            shown = f"(default: {everywhere[0] if everywhere else owners})"
            options[field.name] = flag(hints[field.name], texts[field.name], shown)
    return _group("Network", "Replace values of the preset.", options)


def _shown(value: object) -> str:
    """A default as one would type it."""
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    return repr(value) if isinstance(value, str) and not value.isprintable() else str(value)


def _group(name: str, text: str, options: dict[str, Any]) -> Any:
    group = TypedDict(name, options, total=False)
    group.__doc__ = text
    return group


TEXT_FLAGS = flags(TextOptions, choices={"preset": tuple(PRESETS), "vocabulary": VOCABULARIES})
TRAINING_FLAGS = flags(TrainingOptions, without=("progress", "trackers"))
NETWORK_FLAGS = network_flags()
GENERATION_FLAGS = flags(
    GenerationOptions,
    without=("stop",),
    choices={"unknown": UNKNOWN},
    aliases={"model_path": ["--model-dir"], "max_new_tokens": ["--max-length"]},
)
EXPORT_FLAGS = flags(ExportOptions, aliases={"model_path": ["--model-dir"]})


@dataclass(frozen=True)
class Train:
    """`qflux train`: each part holds the options that were given."""

    text: Annotated[dict[str, Any], conf.arg(constructor=TEXT_FLAGS)]
    training: Annotated[dict[str, Any], conf.arg(constructor=TRAINING_FLAGS)]
    network: Annotated[dict[str, Any], conf.arg(constructor=NETWORK_FLAGS)]
    # Here, since an option that may be repeated needs a default to add to.
    tracker: Annotated[
        tuple[TrackerName, ...],
        conf.UseAppendAction,
        conf.arg(
            help=documentation(TrainingOptions)["trackers"], help_behavior_hint="(may be repeated)"
        ),
    ] = ()

    def run(self) -> None:
        """Train, and print how the model and counting models do on the held-out text."""
        given, learning = TextOptions(**self.text), self.training
        if given.use_hebbian:
            if learning.get("learning", "hebbian") != "hebbian":
                raise ValueError(
                    f"use_hebbian and learning={learning['learning']!r} contradict each other"
                )
            learning = {**learning, "learning": "hebbian"}
        text = given.load()
        vocabulary = given.make_vocabulary(text)
        config = make_config(given.preset, vocabulary.size, **self.network)
        options = TrainingOptions(**learning, trackers=self.tracker)
        result = train(config, text, vocabulary, options)
        baselines = ngram_losses(
            [vocabulary.encode(work) for work in text.train.values()],
            [vocabulary.encode(work) for work in text.validation.values()],
            vocabulary.size,
        )
        print(f"{result.steps} steps in {result.seconds:.1f} s, files in {options.output_dir}")
        print("validation loss, nats per token:")
        print(f"  model    {result.validation_loss:.3f} (best {result.best_validation_loss:.3f})")
        for name, loss in baselines.items():
            print(f"  {name:8} {loss:.3f}")


@dataclass(frozen=True)
class Generate:
    """`qflux generate`: the options that were given."""

    generation: Annotated[dict[str, Any], conf.arg(constructor=GENERATION_FLAGS)]
    stop: Annotated[
        tuple[str, ...],
        conf.UseAppendAction,
        conf.arg(
            help=documentation(GenerationOptions)["stop"], help_behavior_hint="(may be repeated)"
        ),
    ] = ()

    def run(self) -> None:
        """Write the prompt and its continuation, as it is made."""
        options = GenerationOptions(**self.generation, stop=self.stop)
        model, vocabulary = load_model(options.model_path, options.device)
        Session(options, model, vocabulary).run()


@dataclass(frozen=True)
class Export:
    """`qflux export`: the options that were given."""

    export: Annotated[dict[str, Any], conf.arg(constructor=EXPORT_FLAGS)]

    def run(self) -> None:
        """Write the Hugging Face model."""
        # Only here: importing transformers takes seconds, and it may be missing.
        from .hf import export

        options = ExportOptions(**self.export)
        export(options.model_path, options.output_dir, overwrite=options.overwrite)
        print(f"Hugging Face model in {options.output_dir}")
