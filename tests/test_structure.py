"""The shape of the repository: imports point one way, nothing happens at import, every command in the README
parses."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ("1-pretrain_vlm.py", "2-sft_vlm.py", "3-eval_chat.py", "web_server.py")
FORBIDDEN = {  # importer -> what it must never import
    "model": {"trainer", "dataset", "argparse", "gradio", "wandb", "torch.distributed", "tqdm"},
    "trainer": {"dataset", "gradio"},
    "web_server.py": {"trainer", "dataset", "wandb"},
}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("importer", FORBIDDEN)
def test_imports_point_one_way(importer):
    files = [ROOT / importer] if importer.endswith(".py") else sorted((ROOT / importer).glob("*.py"))
    assert files
    for path in files:
        for name in imports_of(path):
            wrong = {bad for bad in FORBIDDEN[importer] if name == bad or name.startswith(bad + ".")}
            assert not wrong, f"{path.name} imports {name}"


def test_the_model_prints_nothing():
    for path in sorted((ROOT / "model").glob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), (
            path.name
        )


def test_the_config_needs_no_torch():
    code = "import sys, model.LMConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nothing_happens_at_import():
    """At the top level stand imports, definitions and constants; no call is made for its effect."""
    files = [
        path
        for pattern in ("*.py", "model/*.py", "trainer/*.py", "dataset/demo_world/*.py")
        for path in ROOT.glob(pattern)
    ]
    assert len(files) > 20
    for path in files:
        for node in ast.parse(path.read_text()).body:
            quiet = isinstance(
                node,
                ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign,
            )
            quiet |= isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)  # a docstring
            quiet |= isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            assert quiet or path.name == "__main__.py", f"{path}:{node.lineno}: {ast.unparse(node)[:60]}"


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", name), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documented_commands() -> list[tuple[str, str]]:
    """(where, command) for every command line of ours in the README and in the scripts' docstrings."""
    texts = {name: ast.get_docstring(ast.parse((ROOT / name).read_text())) for name in SCRIPTS}
    texts["README.md"] = "\n".join(
        re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    )
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
        from dataset.demo_world.build import parse_args

        parse_args(words[3:])
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
