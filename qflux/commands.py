"""The commands of the command line: their options, taken from the dataclasses, and what they do.

Every option is a field of a dataclass: its docstring is the help, its default the default.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
from typing_extensions import Required, TypedDict
from tyro import conf

from qflux_kernels import BackendUnavailableError
from qflux_kernels.checks import check_integer

from .inference.session import STANDARD_INPUT, GenerationOptions, Session
from .inference.text import UNKNOWN
from .models.config import ModelConfig
from .models.presets import PRESETS, make_config
from .report.files import check_target
from .report.write import AnalysisOptions, analyze_file, analyze_text, check_packages
from .text.files import check_path
from .text.ngrams import ngram_losses
from .text.sources import TextSource, open_dataset, open_split, open_text
from .text.tokens import encode_text, sample_windows
from .text.vocabulary import (
    DEFAULT_BPE_SIZE,
    VOCABULARIES,
    BpeVocabulary,
    CharacterVocabulary,
    Vocabulary,
    make_vocabulary,
)
from .train.checkpoint import load_model, read_config, read_vocabulary
from .train.evaluation import score
from .train.loop import NonFiniteLossError, train
from .train.options import TrackerName, TrainingOptions
from .train.ranks import LostRankError
from .train.record import RUN_FILE, RunRecord, read_record
from .train.start import read_start

USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    MemoryError,
    BackendUnavailableError,
    NonFiniteLossError,
    LostRankError,
)
# What of `TextOptions` says what a token is.
TOKEN_OPTIONS = ("vocabulary", "vocab_size", "vocabulary_file")


@dataclass(frozen=True)
class TextOptions:
    """What to train on and which network.

    Args:
        preset: network: "lm" is the recommended one, "flux" and "qfnn" are the documents'.
        data: text file, or folder of .txt files (.txt.xz, .txt.gz and .txt.bz2 too); None: the
            Shakespeare that comes with the package.
        dataset: instead of `data`, name of a Hugging Face dataset, or its folder.
        dataset_config: configuration of the dataset.
        dataset_streaming: read the dataset over the network each time instead of downloading it.
        text_column: column of the dataset that holds the text.
        validation_share: share of the characters that is held out to validate on, in (0, 1); None:
            0.1, or what the folder or the dataset says.
        validation_works: names of the files, or splits of the dataset, that are held out instead.
        vocabulary: what a token is: a byte, a character, or a frequent run of bytes.
        vocab_size: number of tokens of the vocabulary "bpe".
        vocabulary_file: GPT-2's vocab.json (beside merges.txt) or a tokenizer.json, instead of
            `vocabulary`.
        use_hebbian: the same as `learning` "hebbian".

    Raises:
        ValueError: a name of a file or of a dataset that is empty.
    """

    preset: str = "lm"
    data: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_streaming: bool = False
    text_column: str = "text"
    validation_share: float | None = None
    validation_works: tuple[str, ...] = ()
    vocabulary: str = "char"
    vocab_size: int = DEFAULT_BPE_SIZE
    vocabulary_file: str | None = None
    use_hebbian: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "dataset", "vocabulary_file"):
            if getattr(self, name) is not None:
                check_path(name, getattr(self, name))

    def load(self) -> TextSource:
        """The text of the file, the folder or the dataset, to be read when it is needed."""
        division = {
            "validation_share": self.validation_share,
            "validation_works": self.validation_works,
        }
        if self.dataset is None:
            return open_text(self.data, **division)
        if self.data is not None:
            raise ValueError("data and dataset cannot both be given")
        return open_dataset(
            self.dataset,
            self.dataset_config,
            column=self.text_column,
            streaming=self.dataset_streaming,
            **division,
        )

    def make_vocabulary(self, text: TextSource) -> Vocabulary:
        """The vocabulary of that text, or the one in `vocabulary_file`."""
        if self.vocabulary_file is not None:
            return BpeVocabulary.read(self.vocabulary_file)
        if self.vocabulary != CharacterVocabulary.kind:
            return make_vocabulary(self.vocabulary, text.read_train(), self.vocab_size)
        # Characters of the held-out works need ids; their pairs must not be counted.
        characters = text.characters
        if len(text.parts[0]) > 1 and not set(characters) & {"\n", " "}:
            # Works that are joined need something between them.
            characters += "\n"
        return make_vocabulary(self.vocabulary, characters, self.vocab_size)


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate, and on which text.

    Args:
        model_path: folder that training wrote.
        data: text file, or folder of .txt files (.txt.xz, .txt.gz and .txt.bz2 too), all of it.
        dataset: instead of `data`, name of a Hugging Face dataset, or its folder.
        dataset_config: configuration of the dataset.
        dataset_streaming: read the dataset over the network instead of downloading it.
        dataset_split: split of the dataset.
        text_column: column of the dataset that holds the text.
        eval_tokens: predict at most so many tokens, >= 1, in windows that are evenly spread and
            always the same; None: all.
        batch_size: windows that are computed together, >= 1.
        device: where to run, as PyTorch names it, such as cpu, cuda or cuda:1.

    Raises:
        TypeError, ValueError: naming the option, its value and the allowed values.
    """

    model_path: str
    data: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_streaming: bool = False
    dataset_split: str = "test"
    text_column: str = "text"
    eval_tokens: int | None = None
    batch_size: int = 12
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("model_path", "data", "dataset"):
            if getattr(self, name) is not None:
                check_path(name, getattr(self, name))
        check_integer("batch_size", self.batch_size, 1)
        if self.eval_tokens is not None:
            check_integer("eval_tokens", self.eval_tokens, 1)
        if (self.data is None) == (self.dataset is None):
            raise ValueError("one of data and dataset must be given: the text to evaluate on")

    def load(self) -> TextSource:
        """The text of the file, the folder or the split of the dataset."""
        if self.dataset is None:
            return open_text(self.data).whole
        return open_split(
            self.dataset,
            self.dataset_config,
            split=self.dataset_split,
            column=self.text_column,
            streaming=self.dataset_streaming,
        )


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
EVALUATION_FLAGS = flags(EvaluationOptions, aliases={"model_path": ["--model-dir"]})
ANALYSIS_FLAGS = flags(
    AnalysisOptions, choices={"unknown": UNKNOWN}, aliases={"model_path": ["--model-dir"]}
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
        record = None
        if restarted(self.training):
            self.training["resume"] = True
            self.training.pop("overwrite", None)
        if self.training.get("resume"):
            record = read_record(check_path("output_dir", self.training["output_dir"]))
        run = self._new() if record is None else self._resumed(record)
        result = train(run.config, run.text, run.vocabulary, run.options, source=run.source)
        options = run.options
        if options.dry_run or not result.first:
            return
        assert result.text is not None, "train gives the text that it was trained on"
        held_out = result.text.validation_sample(options.eval_tokens, run.config.context_length)
        baselines = ngram_losses(result.text.train, held_out, run.vocabulary.size)
        print(f"{result.steps} steps in {result.seconds:.1f} s, files in {options.output_dir}")
        print(f"ended at {result.reason}")
        print("validation loss, nats per token:")
        print(f"  model    {result.validation_loss:.3f} (best {result.best_validation_loss:.3f})")
        for name, loss in baselines.items():
            print(f"  {name:8} {loss:.3f}")
        print(f"next: qflux generate --model-path {shlex.quote(str(options.output_dir))}")
        print(f"more: {result.more}")

    def _new(self) -> _Run:
        """What to do for the options given."""
        given = TextOptions(**self.text)
        options = TrainingOptions(**self._learning(), trackers=self.tracker)
        text = given.load()
        if options.init_from is None:
            vocabulary = given.make_vocabulary(text)
            config = make_config(given.preset, vocabulary.size, **self.network)
        else:
            for name in ("preset", *TOKEN_OPTIONS):
                if name in self.text:
                    raise ValueError(
                        f"{name} and init_from cannot both be given: the model of "
                        f"{str(options.init_from)!r} has its own"
                    )
            config, vocabulary = read_start(options.init_from)
            config = changed_config(config, self.network)
        return _Run(config, text, vocabulary, options, _source(given))

    def _resumed(self, record: RunRecord) -> _Run:
        """What the run in a folder was to do, with the options that were given anew.

        Raises:
            ValueError: the text or the network is said to be another one.
        """
        learning = {**record.options, **self._learning()}
        if self.tracker:
            learning["trackers"] = self.tracker
        folder = Path(learning["output_dir"])
        try:
            stored = TextOptions(**record.source)
            options = TrainingOptions(**learning)
        except TypeError as error:
            raise ValueError(f"the run.json in {str(folder)!r} has a bad value: {error}") from None
        for name in ("preset", "vocabulary", "vocab_size"):
            if name in self.text and self.text[name] != getattr(stored, name):
                raise ValueError(
                    f"cannot resume with another {name}: {getattr(stored, name)!r} -> "
                    f"{self.text[name]!r}"
                )
        given = replace(stored, **self.text)
        try:
            text = given.load()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; data says where the text of the run is now"
            ) from None
        anew = self.text.get("vocabulary_file") is not None
        vocabulary = given.make_vocabulary(text) if anew else read_vocabulary(folder)
        config = changed_config(read_config(folder), self.network)
        return _Run(config, text, vocabulary, options, _source(given))

    def _learning(self) -> dict[str, Any]:
        """The options of training that were given."""
        if not self.text.get("use_hebbian"):
            return self.training
        if self.training.get("learning", "hebbian") != "hebbian":
            raise ValueError(
                f"use_hebbian and learning={self.training['learning']!r} contradict each other"
            )
        return {**self.training, "learning": "hebbian"}


def restarted(training: Mapping[str, Any]) -> bool:
    """Whether torchrun has started a run anew that wrote its record before it was lost."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return again and (Path(training["output_dir"]) / RUN_FILE).is_file()


@dataclass(frozen=True)
class _Run:
    """What `train` takes."""

    config: ModelConfig
    text: TextSource
    vocabulary: Vocabulary
    options: TrainingOptions
    source: dict[str, Any]


def _source(given: TextOptions) -> dict[str, Any]:
    """The options of a text as a run keeps them: paths are good from every folder."""
    kept = {name: value for name, value in asdict(given).items() if name != "use_hebbian"}
    for name in ("data", "dataset", "vocabulary_file"):
        if kept[name] is not None and Path(kept[name]).exists():
            kept[name] = str(Path(kept[name]).resolve())
    return kept


def changed_config(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """The configuration with other values of some fields.

    Raises:
        ValueError: its family has no such field; named.
    """
    unknown = sorted(set(changes) - {field.name for field in fields(config)})
    if unknown:
        raise ValueError(f"the {config.architecture!r} network has no {', '.join(unknown)}")
    return replace(config, **changes)


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
        """Write the prompt and its continuation, as it is made, and a report of both if asked."""
        options = GenerationOptions(**self.generation, stop=self.stop)
        report = _report_of(options)
        model, vocabulary = load_model(options.model_path, options.device)
        session = Session(options, model, vocabulary)
        session.run()
        if report is not None:
            page, notes = analyze_text(session.text, model, vocabulary, report)
            for line in (*(f"note: {note}" for note in notes), f"report in {page}"):
                print(line, file=sys.stderr)


def _report_of(options: GenerationOptions) -> AnalysisOptions | None:
    """What to write beside the text; None for no report.

    Raises:
        ImportError, OSError, ValueError: no report can be written.
    """
    if not options.analyze:
        return None
    assert options.output_dir is not None, "GenerationOptions checks it"
    check_packages()
    check_target(Path(options.output_dir), options.overwrite, Path(options.model_path))
    return AnalysisOptions(
        options.model_path,
        input_file=STANDARD_INPUT,
        output_dir=options.output_dir,
        overwrite=options.overwrite,
        device=options.device,
    )


@dataclass(frozen=True)
class Analyze:
    """`qflux analyze`: the options that were given."""

    analysis: Annotated[dict[str, Any], conf.arg(constructor=ANALYSIS_FLAGS)]

    def run(self) -> None:
        """Write the report, and say where it is and what it leaves out."""
        page, notes = analyze_file(AnalysisOptions(**self.analysis))
        for line in notes:
            print(f"note: {line}", file=sys.stderr)
        print(f"report in {page}")


@dataclass(frozen=True)
class Eval:
    """`qflux eval`: the options that were given."""

    evaluation: Annotated[dict[str, Any], conf.arg(constructor=EVALUATION_FLAGS)]

    def run(self) -> None:
        """Print the loss of the model on the text in nats, bits and perplexities."""
        options = EvaluationOptions(**self.evaluation)
        text = options.load()
        model, vocabulary = load_model(options.model_path, options.device)
        encoded = encode_text(text, vocabulary, progress=True)
        works = sample_windows(encoded.train, options.eval_tokens, model.config.context_length)
        found = score(
            model, works, vocabulary.token_bytes(), batch_size=options.batch_size, progress=True
        )
        if not math.isfinite(found.nats):
            raise ValueError(
                f"the loss of the model {options.model_path!r} on this text is {found.nats}: "
                "its weights have diverged"
            )
        total = encoded.tokens("train")
        print(f"tokens predicted      {found.tokens:,} of {total:,} ({found.bytes:,} bytes)")
        for name, value in (
            ("nats per token", found.nats),
            ("bits per byte", found.bits_per_byte),
            ("perplexity per token", found.perplexity),
            ("perplexity per byte", found.byte_perplexity),
        ):
            print(f"{name:21} {value:.4f}")
        for heading, line in encoded.report(model.config.context_length)[2:]:
            print(f"{heading:21} {line}", file=sys.stderr)


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
