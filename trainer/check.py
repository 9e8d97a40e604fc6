"""Is everything in place? Answers in seconds, before a run of hours; trains nothing, saves nothing.

    python -m trainer.check                                           # stage 1
    python -m trainer.check pretrain @dataset/demo/pretrain.args      # with the flags of the run to come
    python -m trainer.check sft --multi True
    python -m trainer.check sft --all_images                        # load all rows with their images
    torchrun --standalone --nproc_per_node 2 -m trainer.check         # for a run of two processes

The first argument names the stage: pretrain (default), sft, or a script of your own built like theirs. All
other flags are the stage's, which its script lists (--help): its parse_args and make_stage say what would be
trained.
Exit status 0 if all is in place; else 2, after one line per problem that says what cures it.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from trainer.script import Parser, clean_exit

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"pretrain": ROOT / "1-pretrain_vlm.py", "sft": ROOT / "2-sft_vlm.py"}
NUM_LOADED = 200  # rows loaded with their images, spread over the file


def load_script(path: Path) -> ModuleType:
    """A numbered script as a module; `import` could not take its name."""
    if not path.is_file():
        raise FileNotFoundError(f"no stage {path}: name {' or '.join(SCRIPTS)}, or a script")
    spec = importlib.util.spec_from_file_location("stage", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    name, *rest = argv if argv and not argv[0].startswith(("-", "@")) else ["pretrain", *argv]
    parser = Parser(__doc__)
    parser.prog = "python -m trainer.check"
    parser.fromfile_prefix_chars = None  # the script's own parser, which knows all flags, reads recipes
    parser.add_argument(
        "--all_images",
        "--all_pictures",
        action="store_true",
        help=f"load all rows with their images, instead of {NUM_LOADED} of them",
    )
    own, flags = parser.parse_known_args(rest)
    path = SCRIPTS.get(name, Path(name))
    script = load_script(path)
    args = script.parse_args(flags)
    stage = script.make_stage(args)

    from trainer.inspection import inspect  # only now: loading PyTorch takes seconds

    num_loaded = None if own.all_images else NUM_LOADED
    if inspect(args, stage, path.name, num_loaded):
        sys.exit(2)


if __name__ == "__main__":
    clean_exit(main)
