"""A small world for the tests: the demo's tokenizer, a randomly initialised CLIP in the real format, rows and
images."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from dataset.demo_world.tokenizer import train_tokenizer
from model.checkpoint import save_weights
from model.LMConfig import LMConfig
from model.names import weights_path
from model.prompt import Renderer, load_tokenizer
from model.transformer import Transformer
from trainer.loop import Trainer
from trainer.script import clean_exit

ROOT = Path(__file__).resolve().parent.parent
LONG = 600  # seconds after which something hangs; a busy machine needs many times what an idle one does
GREYS = [20, 80, 140, 200, 250]  # for save_video(); far enough from each other to survive a codec
SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts into the background deaf to Ctrl-C, and so would be all that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: with two workers the suite then ends when it ends, or soon after."""
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")


def save_clip(folder: Path, **vision) -> Path:
    """A CLIP folder as openai/clip-vit-base-patch32 is laid out, with random weights."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    model = CLIPModel(
        CLIPConfig(
            projection_dim=8,
            text_config=sizes | {"vocab_size": 50},
            vision_config=sizes | {"image_size": 224, "patch_size": 32} | vision,
        )
    )
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "size": 224,
            }
        )
    )
    return folder


def save_image(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)


def save_video(
    path: Path,
    frames: Iterable[int | Image.Image],
    rate: int | str = 1,
    codec: str = "mpeg4",
    size: tuple[int, int] = (64, 64),
    rotation: int = 0,
    **more,
) -> Path:
    """A video of grey frames, each given by its grey, or of images; more: attributes of the stream."""
    sizes = {"width": size[0], "height": size[1], "pix_fmt": "yuv420p"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate), **(sizes | more))
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            image = frame if isinstance(frame, Image.Image) else Image.new("RGB", size, (frame,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def make_row(question="<image>\n什么？", answer="它是蓝色。", image="0.png", **more) -> dict:
    """A row of one round, right or wrong."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns} | more


def make_question(answer="红", **more) -> dict:
    return {"image": "images/0.png", "question": "什么颜色？", "answer": answer, "kind": "colour"} | more


def write_questions(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def make_rows(count: int) -> list[dict]:
    """Rows with answers of very different length."""
    words = ["图片里有一个红色圆形。", "它是蓝色。", "A large green star at the top left."]
    return [
        {
            "id": str(n),
            "image": f"{n % 6}.png",
            "conversations": [
                {"from": "human", "value": "<image>\n描述这张图片。" if n % 2 else "图片里有什么？\n<image>"},
                {"from": "gpt", "value": words[n % 3] * (1 + n % 4)},
            ],
        }
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    """One token per word of words.json: the demo world may learn new words, the golden losses stay."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, json.loads((Path(__file__).parent / "words.json").read_text(encoding="utf-8")))
    return folder


@pytest.fixture(scope="session")
def world_tokenizer_path(tmp_path_factory) -> Path:
    """The demo world's own, which learns new words with it."""
    folder = tmp_path_factory.mktemp("world_tokenizer")
    train_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def renderer(tokenizer) -> Renderer:
    """50 tokens per image, a context of 512."""
    return Renderer(tokenizer)


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def config(tokenizer) -> LMConfig:
    return LMConfig(**SIZES, vocab_size=len(tokenizer), vision_dim=24, max_seq_len=256)


@pytest.fixture
def model(config) -> Transformer:
    torch.manual_seed(1)
    return Transformer(config).eval()


@pytest.fixture
def lively(model) -> Transformer:
    """Untrained weights with loud layers: with quiet ones greedy decoding repeats one token for ever."""
    with torch.no_grad():
        for parameter in model.layers.parameters():
            if parameter.ndim > 1:
                parameter.mul_(15)
    return model.requires_grad_(False)


def v1_state_dict(config: LMConfig, bias: bool = False, experts: int = 0) -> dict[str, torch.Tensor]:
    """A state dict as MiniMind-V v1 saved it: its key names, its buffers, its nested projection; with
    experts, and one more that is shared."""

    def matrix(*shape):
        return 0.2 * torch.randn(shape)

    dim, hidden, kv_dim = config.dim, config.hidden_dim, config.n_kv_heads * config.head_dim
    state = {
        "tok_embeddings.weight": matrix(config.vocab_size, dim),
        "norm.weight": 1 + matrix(dim),
        "pos_cis": torch.randn(config.max_seq_len, config.head_dim // 2, dtype=torch.complex64),
        "vision_proj.vision_proj.0.weight": matrix(dim, config.vision_dim),
    }
    state["output.weight"] = state["tok_embeddings.weight"]
    if bias:
        state["vision_proj.vision_proj.0.bias"] = matrix(dim)
    for n in range(config.n_layers):
        block = {f"{name}.weight": 1 + matrix(dim) for name in ("attention_norm", "ffn_norm")}
        block |= {
            f"attention.{name}.weight": matrix(width, dim)
            for name, width in (("wq", dim), ("wk", kv_dim), ("wv", kv_dim), ("wo", dim))
        }
        parts = [f"experts.{number}." for number in range(experts)] + ["shared_experts."] if experts else [""]
        for part in parts:
            block |= {
                f"feed_forward.{part}w1.weight": matrix(hidden, dim),
                f"feed_forward.{part}w2.weight": matrix(dim, hidden),
                f"feed_forward.{part}w3.weight": matrix(hidden, dim),
            }
        if experts:
            block["feed_forward.gate.weight"] = matrix(experts, dim)
        state |= {f"layers.{n}.{name}": tensor for name, tensor in block.items()}
        state[f"layers.{n}.attention.mask"] = torch.zeros(1, 1, 8, 8)
    return state


@pytest.fixture
def workplace(tmp_path, tokenizer, tokenizer_path, clip_path) -> Path:
    """A folder from which the numbered scripts can run: out/32_llm.pth, data.json, images, and a recipe
    `args`."""
    torch.manual_seed(2)
    llm = Transformer(LMConfig(**SIZES, vocab_size=len(tokenizer), vision_dim=0, max_seq_len=256))
    save_weights(llm, weights_path(tmp_path / "out", llm.config, "llm"))
    (tmp_path / "images").mkdir()
    for number in range(6):
        save_image(tmp_path / "images" / f"{number}.png", number)
    (tmp_path / "data.json").write_text(json.dumps(make_rows(24), ensure_ascii=False))
    flags = [f"--{name}={value}" for name, value in SIZES.items()]
    flags += [
        f"--tokenizer_path={tokenizer_path}",
        f"--clip_path={clip_path}",
        f"--out_dir={tmp_path}/out",
        f"--data_path={tmp_path}/data.json",
        f"--image_dir={tmp_path}/images",
        "--max_seq_len=256",
        "--batch_size=4",
        "--learning_rate=1e-3",
        "--num_workers=0",
        "--device=cpu",
        "--dtype=float32",
        "--log_interval=1",
    ]
    (tmp_path / "args").write_text("\n".join(flags))
    return tmp_path


@pytest.fixture
def seeing(workplace, config, model) -> list[str]:
    """Flags of an evaluation with a model that sees and knows nothing."""
    save_weights(model, weights_path(workplace / "out", config, "vlm_sft"))
    keep = ("--tokenizer_path", "--clip_path", "--out_dir", "--device")
    flags = [flag for flag in (workplace / "args").read_text().splitlines() if flag.startswith(keep)]
    return [*flags, "--max_new_tokens=4"]


def run_script(
    *command: str, processes: int = 1, timeout: int = LONG, folder: Path = ROOT
) -> subprocess.CompletedProcess:
    """Run a script of the repository as a process in a folder, under torchrun if there are several."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*launcher, *map(str, command)],
        cwd=folder,
        env=environment,
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def load_script(name: str) -> ModuleType:
    """A script as a module; its name is no word of Python's."""
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", name), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_inside(script: str, *flags: str) -> None:
    """Run a numbered script in this process, for tests that reach into it."""
    load_script(script).main([str(flag) for flag in flags])


def run_clean(capsys, script: str, *flags: str) -> subprocess.CompletedProcess:
    """As run_script(), but in this process, where nothing has to be imported anew."""
    status = 0
    try:
        clean_exit(lambda: run_inside(script, *flags))
    except SystemExit as end:
        status = end.code
    return subprocess.CompletedProcess([script, *flags], status, *capsys.readouterr())


class PowerCut(Exception):
    pass


def cut_after(monkeypatch, steps: int) -> None:
    """Let Trainer.step fail in the middle of step number steps + 1 of a process."""
    original, taken = Trainer.step, []

    def step(self, *arguments):
        if len(taken) == steps:
            raise PowerCut
        taken.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "step", step)


def weights_of(workplace: Path, stage: str = "vlm_pretrain", folder: str = "out") -> dict[str, torch.Tensor]:
    return torch.load(workplace / folder / f"32_{stage}.pth", weights_only=True)


def check_same(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def wait_until(condition, seconds: float = LONG, pause: float = 0.02) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(pause)


def children_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if "1-pretrain" in Path(f"/proc/{child}/cmdline").read_text()]


def train(
    workplace: Path,
    *flags: str,
    script: str = "1-pretrain_vlm.py",
    processes: int = 1,
) -> subprocess.CompletedProcess:
    """Six steps of a stage, or as many as the flags say."""
    result = run_script(script, f"@{workplace}/args", "--max_steps=6", *flags, processes=processes)
    assert result.returncode == 0, result.stderr
    return result


def check_refused(result: subprocess.CompletedProcess, *fragments: str) -> None:
    """Bad input: exit status 2 and ONE line that names what is wrong, no traceback."""
    message = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and len(message) == 1, result.stderr
    for fragment in fragments:
        assert fragment in message[0], f"{fragment!r} is not in: {message[0]}"


@pytest.fixture
def browser():
    path = shutil.which("chromium")
    if not path:
        pytest.skip("no browser: apt-get install chromium fonts-noto-cjk")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
