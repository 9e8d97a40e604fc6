"""Commands that take the flags of a stage: python -m trainer.check, python -m trainer.gain."""

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

from trainer.inputs import Stage
from trainer.script import Parser

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"pretrain": ROOT / "1-pretrain_vlm.py", "sft": ROOT / "2-sft_vlm.py"}


def load_script(path: Path) -> ModuleType:
    """A numbered script as a module; `import` could not take its name."""
    if not path.is_file():
        raise FileNotFoundError(f"no stage {path}: name {' or '.join(SCRIPTS)}, or a script")
    spec = importlib.util.spec_from_file_location("stage", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_stage(
    parser: Parser, argv: list[str]
) -> tuple[argparse.Namespace, argparse.Namespace, Stage, Path]:
    """The parser's own flags, those of the stage that the first argument names (pretrain, if none does), what
    that stage is, and its script."""
    name, *rest = argv if argv and not argv[0].startswith(("-", "@")) else ["pretrain", *argv]
    parser.fromfile_prefix_chars = None  # the script's own parser, which knows all flags, reads recipes
    own, flags = parser.parse_known_args(rest)
    path = SCRIPTS.get(name, Path(name))
    script = load_script(path)
    args = script.parse_args(flags)
    return own, args, script.make_stage(args), path
