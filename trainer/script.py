"""What every command of this repository shares: flags with recipes and bounds, and errors of one line.

A recipe is a text file of flags, one or more per line:

    # a comment: a "#" begins one at the beginning of a line or after a space, nowhere else
    --data_path=D:\\data\\rows.json  --out_dir=out/exp#2
    --wandb_run_name "quotes of either kind hold words together"

Imports nothing heavy: a wrong flag is reported before PyTorch is loaded.
"""

import argparse
import codecs
import contextlib
import difflib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from model.download_table import find_download
from model.names import CLIP_PATH, DEVICE, DTYPES, TOKENIZER_PATH, find_weights
from model.printable import one_line, printable

WORD = re.compile(r"""\s*(\#.*|(?:"[^"]*"|'[^']*'|[^\s"'])+)""", re.ASCII)  # of a recipe, or a comment
QUOTED = re.compile(r""""([^"]*)"|'([^']*)'""")
NO_MEMORY = re.compile("can't allocate memory|not enough memory")  # of PyTorch, on a CPU
MOST_SHOWN = 4000  # characters of an error
SEED_LIMIT = 2**63  # PyTorch's generators take no more


class AgreedError(ValueError):
    """An error that all ranks raise alike; rank 0 alone prints it."""


class Checked:
    """A flag's type that also knows which values make sense. They are checked when all flags are read, so
    that everything that is wrong is reported at once."""

    def __init__(self, kind: type, is_valid: Callable[[object], bool], rule: str):
        self.kind, self.is_valid, self.rule = kind, is_valid, rule
        self.__name__ = kind.__name__  # for argparse's "invalid int value"

    def __call__(self, text: str):
        return self.kind(text)


def at_least(low: int, kind: type = int, below: float = math.inf) -> Checked:
    rule = f"at least {low}" if below == math.inf else f"at least {low} and below {below}"
    return Checked(kind, lambda value: low <= value < below, rule)  # NaN is neither


def above(number: float) -> Checked:
    return Checked(float, lambda value: number < value < math.inf, f"above {number}")


def matching(pattern: re.Pattern, rule: str) -> Checked:
    return Checked(str, lambda value: bool(pattern.fullmatch(value)), rule)


class Parser(argparse.ArgumentParser):
    """argparse with @files whose lines hold flags and # comments, defaults in every help text, the nearest
    name for a wrong flag, and errors of one line."""

    def __init__(self, description: str):
        super().__init__(
            usage="%(prog)s [@recipe.args] [flags]",
            description=description,
            formatter_class=HelpFormatter,
            fromfile_prefix_chars="@",
            allow_abbrev=False,
        )
        self.pipes: dict[str, list[str]] = {}  # the words of recipes that are no files

    def _read_args_from_files(self, arg_strings: list[str]) -> list[str]:
        """argparse's own takes every word that begins with @ for a recipe, the value of a flag too."""
        return self.expand(arg_strings, ())

    def expand(self, words: Sequence[str], inside: tuple[str, ...]) -> list[str]:
        """The words with those of a recipe in the place of its name; inside: the recipes that name them."""
        expanded: list[str] = []
        for word in words:
            is_recipe = word.startswith("@") and not (expanded and self.needs_value(expanded[-1]))
            if is_recipe and word in inside:
                raise ValueError(f"recipe {word[1:]} names itself")
            expanded += self.expand(self.read(word[1:]), (*inside, word)) if is_recipe else [word]
        return expanded

    def needs_value(self, word: str) -> bool:
        """Is this a flag that the next word belongs to, whatever that looks like?"""
        action = self._option_string_actions.get(word)
        return action is not None and (action.nargs is None or action.nargs == "+")

    def read(self, path: str) -> list[str]:
        """The words of a recipe. A pipe is read once: it has nothing to say the second time."""
        if path in self.pipes:
            return self.pipes[path]
        words = read_recipe(path)
        if not os.path.isfile(path):
            self.pipes[path] = words
        return words

    def error(self, message: str):
        self.exit(2, f"error: {one_line(message, MOST_SHOWN)} (--help lists the flags)\n")

    def parse_args(self, argv: list[str] | None = None, namespace=None) -> argparse.Namespace:
        """As argparse, then every flag against its bounds. Raises ValueError with all that are outside."""
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            flags = [word for word in unknown if word.startswith("-")]
            self.error(
                "; ".join(f"unknown flag {word}{self.suggest(word)}" for word in flags)
                or f"unexpected argument {unknown[0]}"
            )
        problems = [
            f"--{action.dest} must be {action.type.rule}, not {getattr(args, action.dest)}"
            for action in self._actions
            if isinstance(action.type, Checked)
            and getattr(args, action.dest) is not None
            and not action.type.is_valid(getattr(args, action.dest))
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return args

    def suggest(self, word: str) -> str:
        known = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.7)
        return f": did you mean {near[0]}?" if near else ""


def read_recipe(path: str) -> list[str]:
    """The words in a text file of flags. Raises FileNotFoundError or ValueError, naming file and line."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no recipe {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file system can hold
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read recipe {path}: {reason}") from None
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # PowerShell's `>` writes these
    # Bytes that are no UTF-8 come through as they do from the command line: in the names of files.
    text = content.decode("utf-16" if is_wide else "utf-8-sig", "replace" if is_wide else "surrogateescape")
    if "\0" in text:
        raise ValueError(f"{path} is not a recipe but a binary file")
    words = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            words += split_words(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return words


def split_words(line: str) -> list[str]:
    """The words in a line of a recipe. Quotes go, backslashes stay: they belong to the names of Windows."""
    words, position = [], 0
    while match := WORD.match(line, position):
        position = match.end()
        if not match[1].startswith("#"):
            words.append(QUOTED.sub(lambda quoted: quoted[1] or quoted[2] or "", match[1]))
    if line[position:].strip():
        raise ValueError(f"a quote is not closed: {line[position:].strip()[:80]}")
    return words


def quote_word(word: str) -> str:
    """A word as it stands in a recipe: split_words() gives it back."""
    if word and not re.search(r"""[\s"'#]""", word):
        return word
    return '"' + word.replace('"', """"'"'\"""") + '"'


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and behind every flag its default, where its help does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        silent = default is None or default is False or default == argparse.SUPPRESS  # 0 is a default
        silent |= not action.option_strings
        return text if silent or "default:" in text else f"{text} (default: %(default)s)".lstrip()


def true_or_false(text: str) -> bool:
    """--multi True and --multi False mean what they say (bool("False") would be True)."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")


def add_device_flags(group) -> None:
    group.add_argument(
        "--device",
        type=matching(DEVICE, "auto, cpu, cuda, cuda:N or mps"),
        default="auto",
        help="auto (CUDA, else Apple's MPS, else CPU), cpu, cuda, cuda:N, mps",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="arithmetic of the matrix products; auto: bfloat16 on GPUs that have it, else float32",
    )
    group.add_argument(
        "--allow_other_inputs",
        action="store_true",
        help="use another CLIP or tokenizer than the weights were trained with (otherwise refused)",
    )


def add_loading_flags(parser: Parser) -> None:
    """Which weights answer, for whoever loads them to ask: find_weights() searches by these."""
    group = parser.add_argument_group("what to load")
    group.add_argument(
        "--load_from",
        "--load",
        type=Path,
        metavar="PATH",
        help="weight file (also v1's own) or Hugging Face folder, instead of searching in --out_dir",
    )
    group.add_argument("--out_dir", default="out", help="folder to look for weights in")
    group.add_argument("--dim", type=at_least(0), default=0, help="only weights of this width (0 = any)")
    group.add_argument(
        "--use_moe",
        type=true_or_false,
        nargs="?",
        const=True,
        metavar="True|False",
        help="only weights of a mixture of experts, or (False) only others",
    )
    group.add_argument(
        "--tokenizer_path", help=f"tokenizer folder (default: what the weights name, else {TOKENIZER_PATH})"
    )
    group.add_argument("--clip_path", help=f"CLIP folder (default: what the weights name, else {CLIP_PATH})")
    add_device_flags(group)


def choose_weights(args: argparse.Namespace, stages: Sequence[str]) -> Path:
    """The weights that the flags of add_loading_flags() name. Raises FileNotFoundError."""
    if args.load_from and not args.load_from.exists():
        command = find_download(args.load_from)
        cure = f": {command} brings it" if command else ""
        raise FileNotFoundError(f"--load_from: there is no file or folder {args.load_from}{cure}")
    return args.load_from or find_weights(args.out_dir, stages, args.dim, args.use_moe)


class Place(NamedTuple):
    """Of one process among those of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def place_in_run() -> Place:
    """What torchrun says in the environment. It sets both RANK and WORLD_SIZE: where one stands alone,
    another program left it there, and this process is the only one."""
    found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    if not (found[0].isdecimal() and found[1].isdecimal()):
        return Place()
    return Place(
        *(int(text) if text.isdecimal() else default for text, default in zip(found, Place(), strict=True))
    )


def print_stream(pieces: Iterator[str]) -> str:
    """Print an answer as it is made; returns it."""
    answer = ""
    for text in pieces:
        print(printable(text), end="", flush=True)
        answer += text
    print()
    return answer


def clean_exit(main: Callable[[], None]) -> None:
    """Run a script's main(): what the user can cure ends in one line and exit status 2, without a traceback.

    MINIMIND_DEBUG=1 shows the traceback.
    """
    # PyTorch's threads wait for each other by spinning. Where other programs want the same cores, that makes
    # a step ten times slower; a shorter spin costs nothing where none do. Read when PyTorch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    for stream in (sys.stdout, sys.stderr):  # what a terminal or a log cannot show must not end a run
        with contextlib.suppress(AttributeError, ValueError):  # no stream, another's, or a closed one
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("MINIMIND_DEBUG"):
            raise
        if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
            print_and_exit("the memory does not suffice: choose a smaller --batch_size, or a smaller model")
        if not re.search(r"gloo|nccl|connection (closed|reset)|timed? ?out", str(error), re.IGNORECASE):
            raise
        print_and_exit(
            "another process of this run has ended or does not answer; all steps done are saved, "
            "--resume continues from there"
        )
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_DEBUG"):
            raise
        print_and_exit(str(error), agreed=isinstance(error, AgreedError))


def print_and_exit(message: str, agreed: bool = False) -> None:
    """One line and exit status 2, once per run: where several ranks have the same to say, rank 0 says it, and
    torchrun then stops the others.

    agreed  all ranks certainly have the same to say
    """
    is_main = place_in_run().rank == 0
    if not is_main:
        time.sleep(5)
    if is_main or not agreed:
        print(f"error: {one_line(message, MOST_SHOWN)}", file=sys.stderr, flush=True)
    sys.exit(2)
