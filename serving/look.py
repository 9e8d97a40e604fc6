"""How the page looks, and what it does in the browser."""

FONTS = [
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "sans-serif",
]
CSS = """
.gradio-container > .main { max-width: 900px !important; padding: 12px 16px !important; }
.gradio-container .column { gap: 10px; }
#head h1 { font-size: 22px; margin: 0; }
#head p { font-size: 13px; margin: 0; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
#chat, #box, #settings { border: 1px solid var(--border-color-primary) !important; }
#chat, #box, #settings, .form:has(> #box) { border-radius: 10px !important; }
#chat { min-height: 380px; }
#chat .message .md { white-space: pre-wrap; overflow-wrap: anywhere; }
#chat .message-row:has(img) + .message-buttons { display: none; } /* "share" would upload the image */
#chat .placeholder { margin: auto; padding: 12px 16px 0; text-align: center; }
#chat .placeholder h2 { margin: 0 0 8px; font-size: 20px; }
#chat .placeholder p { margin: 2px 0; color: var(--body-text-color-subdued); }
#chat .examples { width: 100%; max-width: 640px; gap: 8px; padding: 16px; }
#chat .example { padding: 8px 12px; border: 1px solid var(--border-color-primary); }
#chat .example-content { flex-direction: row; align-items: center; gap: 12px; text-align: left; }
#chat .example-icons-grid { width: auto; }
#settings [data-testid="block-info"] { padding: 0; background: none; color: inherit; white-space: nowrap; }
@media (max-width: 600px) {
    .gradio-container > .main { padding: 8px !important; }
    #box textarea { font-size: 16px; }      /* phones zoom into anything smaller */
    #settings .form > .block { min-width: 100% !important; }
}
"""
# The copy button hands over what the Chatbot was given, escaped (see shown): make it as typed again.
# Without https or loopback there is no navigator.clipboard: it then copies from a textarea off the screen.
COPY = """() => {
    const marks = {amp: "&", lt: "<", gt: ">", quot: '"', "#x27": "'"}, board = navigator.clipboard;
    const typed = text => text.replace(/&(amp|lt|gt|quot|#x27);/g, (all, name) => marks[name]);
    if (board) { const write = board.writeText.bind(board); board.writeText = text => write(typed(text)); }
    document.addEventListener("copy", event => { if (event.target.style?.left === "-999999px") {
        event.clipboardData.setData("text/plain", typed(event.target.value)); event.preventDefault(); } });
}"""
