"""The shape of the repository: imports point one way, nothing happens at import, flags are read before
anything heavy is loaded, the loss is four calls from the command, every command in the README parses."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script

SCRIPTS = ("1-pretrain_vlm.py", "2-sft_vlm.py", "3-eval_chat.py", "web_server.py")
FORBIDDEN = {  # importer -> what it must never import, with all that lies in it
    "model": {
        "trainer",
        "serving",
        "dataset",
        "benchmarks",
        "argparse",
        "gradio",
        "wandb",
        "torch.distributed",
        "tqdm",
    },
    "trainer": {"serving", "dataset", "benchmarks", "gradio"},
    "serving": {"trainer", "dataset", "benchmarks", "wandb"},
    "web_server.py": {"trainer", "dataset", "benchmarks", "wandb"},
}
EXCEPTIONS = {  # file or folder -> what it may import all the same
    "serving": {"trainer.script"},
    "web_server.py": {"trainer.script"},
    "model/download.py": {"trainer.script", "argparse"},  # a command
    "model/export/__main__.py": {"trainer.script", "argparse"},  # a command, as the numbered scripts are
}
COMMANDS = ("model/download.py",)  # python -m model.download: they talk to people, as no other file of model/
LIGHT = (
    "model.LMConfig",
    "model.names",
    "model.files",
    "model.download_table",
    "model.download",
    "model.data.spec",
    "trainer.script",
    "trainer.args",
    "trainer.inputs",
    "trainer.eval_flags",
    "model.stock_config",
    "model.export.__main__",
)
HEAVY = {"torch", "transformers", "numpy", "pandas", "PIL", "av", "gradio", "tokenizers", "matplotlib"}


def files_of(place: str) -> list[Path]:
    """A file, or all Python files of a folder and of the folders in it."""
    return [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides what is imported"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def lies_in(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("importer", FORBIDDEN)
def test_imports_point_one_way(importer):
    files = files_of(importer)
    assert files
    for path in files:
        place = path.relative_to(ROOT).as_posix()
        allowed = set().union(
            *(modules for where, modules in EXCEPTIONS.items() if (place + "/").startswith(where + "/"))
        )
        for name in imports_of(path):
            assert not lies_in(name, FORBIDDEN[importer]) or lies_in(name, allowed), f"{place} imports {name}"


def test_folders_in_folders_are_watched_too():
    """A file that moves into a sub-folder must not lose its guard without a word."""
    data = sorted((ROOT / "model" / "data").glob("*.py"))
    assert len(data) >= 5 and set(data) <= set(files_of("model"))


def test_the_model_prints_nothing():
    for path in {*files_of("model")} - {ROOT / command for command in COMMANDS}:
        if path.name == "__main__.py":  # a command
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), path


def test_flags_are_read_before_anything_heavy_is_loaded():
    """A wrong flag once took 4 to 6 seconds to answer, which PyTorch and transformers need to load. Scripts
    import them in main(), after their flags, so a script that is only loaded has loaded none of them."""
    code = f"""
import importlib.util, sys
def load(name):
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location("script", name)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    else:
        importlib.import_module(name)
for name in {(*LIGHT, *SCRIPTS)!r}:
    load(name)
    if heavy := {HEAVY!r} & set(sys.modules):
        sys.exit(f"{{name}} imports {{', '.join(sorted(heavy))}}")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_nothing_happens_at_import():
    """At the top level stand imports, definitions and constants; no call is made for its effect."""
    files = [*ROOT.glob("*.py")]
    for folder in ("model", "trainer", "serving", "dataset", "benchmarks"):
        files += files_of(folder)
    assert len(files) > 40
    definitions = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    constants = ast.Assign | ast.AnnAssign | ast.AugAssign
    for path in files:
        for node in ast.parse(path.read_text()).body:
            quiet = isinstance(node, definitions | constants)
            quiet |= isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)  # a docstring
            quiet |= isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            assert quiet or path.name == "__main__.py", f"{path}:{node.lineno}: {ast.unparse(node)[:60]}"


# ---- from the command to the loss --------------------------------------------------------------------------


def calls_of(place: str, name: str) -> set[str]:
    """What a function ("train") or a method ("Trainer.step") calls; of (model or self.ddp_model)() both."""
    body = ast.parse((ROOT / place).read_text()).body
    for part in name.split("."):
        (node,) = [node for node in body if getattr(node, "name", None) == part]
        body = node.body
    called = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
    return {
        ast.unparse(part)
        for function in called
        for part in ast.walk(function)
        if isinstance(part, ast.Name | ast.Attribute)
    }


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_the_loss_is_four_calls_and_three_files_from_the_command(script):
    """main, train, Trainer.step, Trainer.loss, Transformer.forward; it once was six calls through a file that
    imported 21 others."""
    hops = (
        (script, "main", "train"),
        ("trainer/loop.py", "train", "trainer.step"),
        ("trainer/loop.py", "Trainer.step", "self.loss"),
        ("trainer/loop.py", "Trainer.loss", "self.ddp_model"),  # the Transformer, with DDP around it or not
        ("model/transformer.py", "Transformer.forward", "F.cross_entropy"),
    )
    for place, name, called in hops:
        assert called in calls_of(place, name), f"{name} in {place} does not call {called}"
    assert len({place for place, _, _ in hops}) <= 3
    assert "trainer.loop.train" in imports_of(ROOT / script)
    assert "Trainer" in calls_of("trainer/loop.py", "train")
    assert any(name.endswith(".backward") for name in calls_of("trainer/loop.py", "Trainer.step"))


# ---- documented commands -----------------------------------------------------------------------------------


def documented_commands() -> list[tuple[str, str]]:
    """(where, command) for every command line of ours in the README and in the scripts' docstrings."""
    texts = {name: ast.get_docstring(ast.parse((ROOT / name).read_text())) for name in SCRIPTS}
    for name in ("README.md", "serving/README.md", "model/README.md"):
        blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
        texts[name] = "\n".join(blocks)
    found = []
    for where, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            line = line.split("  #")[0].strip()
            if re.match(r"(\S*python3?|torchrun|bash) ", line):
                found.append((where, line))
    return found


@pytest.mark.parametrize(("where", "command"), documented_commands())
def test_every_documented_command_parses(where, command, tmp_path, monkeypatch):
    words = shlex.split(command)
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        return
    if words[1:3] == ["-m", "dataset.demo_world"]:
        from dataset.demo_world.__main__ import parse_args

        parse_args(words[3:])
        return
    if words[1:3] == ["-m", "model.download"]:
        from model.download import choose, parse_args, read_table

        assert choose(read_table(), parse_args(words[3:]).names), command
        return
    if words[1] == "-m":
        assert words[2] in ("pip", "venv") or importlib.util.find_spec(words[2]), command
        return
    position = next(n for n, word in enumerate(words) if word.endswith(".py"))
    script, arguments = words[position], words[position + 1 :]
    assert (ROOT / script).is_file(), command
    if script in SCRIPTS:
        for argument in [argument for argument in arguments if argument.startswith("@")]:
            recipe = tmp_path / Path(argument[1:]).name  # made by the demo world, in a test of its own
            recipe.write_text("")
            arguments[arguments.index(argument)] = f"@{recipe}"
        load_script(script).parse_args(arguments)
