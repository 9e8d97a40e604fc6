"""How the page looks, and what it does in the browser: style.css, page.js and what is here."""

from pathlib import Path

HERE = Path(__file__).parent
ICON = HERE / "icon.svg"
FONTS = [
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "sans-serif",
]
# Of the sketch pad: what the demo world calls by these names (dataset/demo_world/colours.py).
COLOURS = {
    "red": "#e01f1f",
    "yellow": "#f2d925",
    "green": "#28a745",
    "blue": "#2b5be0",
    "purple": "#8e2bc9",
    "orange": "#f28c1c",
    "pink": "#f58cba",
    "cyan": "#1fc4d6",
}
CHINESE = dict(zip(COLOURS, "红黄绿蓝紫橙粉青", strict=True))
WIDTHS = {"细 / thin": 8, "中 / medium": 16, "粗 / thick": 40}
SIDE = 448  # pixels of the sketch pad
LANGUAGE = (
    '<button type="button" class="plain-button" data-do="language">'
    '<span lang="zh">English</span><span lang="en">中文</span></button>'
)
FOCUS = (
    "() => { if (matchMedia('(pointer: fine)').matches) document.querySelector('#box textarea')?.focus(); }"
)
# The button under an answer and the words in the dialog; see page.connect_why. Of what stands in an answer,
# Gradio lets no data-* attribute through.
WHY = """
document.addEventListener("click", event => {
    const answer = event.target.closest?.("#chat .why"), word = event.target.closest?.("#why [data-word]");
    if (answer) trigger("click", {index: Number(/at-(\\d+)/.exec(answer.className)[1])});
    if (word) trigger("select", {index: Number(word.dataset.word)});
});
watch("value", () => {
    const card = element.querySelector("dialog");
    if (card && !card.open) card.showModal();
});
"""


def read(name: str) -> str:
    """One of the files beside this one."""
    return (HERE / name).read_text(encoding="utf-8")


def draw_pad() -> str:
    """The sketch pad, as HTML, and the button that opens it; page.js makes it work."""
    colours = "".join(
        f'<button type="button" data-colour="{code}" style="--colour: {code}" title="{CHINESE[name]} {name}" '
        f'aria-label="{name}" aria-pressed="{"true" if name == "red" else "false"}"></button>'
        for name, code in COLOURS.items()
    )
    widths = "".join(
        f'<button type="button" data-width="{width}" aria-pressed="{"true" if width == 16 else "false"}">'
        f"{label}</button>"
        for label, width in WIDTHS.items()
    )
    actions = "".join(
        f'<button type="button" data-do="{name}">{label}</button>'
        for name, label in (
            ("undo", "撤销 / Undo"),
            ("empty", "清空 / Empty"),
            ("close", "取消 / Cancel"),
            ("use", "用这张图 / Use it"),
        )
    )
    return (
        '<button type="button" class="plain-button" data-do="open">✎ 画一张 / ✎ Draw one</button>'
        '<dialog class="card" aria-labelledby="pad-title"><h2 id="pad-title">画一张图 / Draw an image</h2>'
        f'<canvas width="{SIDE}" height="{SIDE}"></canvas>'
        f'<div class="row">{colours}</div><div class="row">{widths}</div><div class="row">{actions}</div>'
        "</dialog>"
    )
