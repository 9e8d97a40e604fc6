// What the page does in the browser, beyond Gradio. Evaluated once, when it has loaded.
() => {
    const find = selector => document.querySelector(selector);

    // ---- language: texts of the page are "中文 / English", or a <span> in each ----
    const both = /^([^]*[\u3400-\u9fff][^]*?) \/ ([^]+)$/, written = new WeakMap();
    const stored = name => { try { return localStorage.getItem(name); } catch { return null; } };
    let chinese = (stored("language") || navigator.language).startsWith("zh");
    const choose = text => { const pair = both.exec(text); return pair ? pair[chinese ? 1 : 2] : text; };
    // What people and the model write stays as it is.
    const isOurs = node => !(node.parentElement || node).closest(".message, .example, textarea, script, style");
    function translate(root) {
        const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
        for (let node = walker.nextNode() ; node; node = walker.nextNode()) {
            const known = written.get(node);
            if (known?.now !== node.data) {
                if (!both.test(node.data) || !isOurs(node)) continue;
                written.set(node, {text: node.data});
            }
            const entry = written.get(node);
            entry.now = choose(entry.text);
            if (node.data !== entry.now) node.data = entry.now;
        }
        for (const box of document.querySelectorAll("[placeholder]")) {
            box.dataset.both ||= box.placeholder;
            if (box.placeholder !== choose(box.dataset.both)) box.placeholder = choose(box.dataset.both);
        }
    }
    function speak() {
        document.documentElement.lang = chinese ? "zh-CN" : "en";
        translate(document.body);
    }
    speak();
    new MutationObserver(() => translate(document.body)).observe(document.body, {
        childList: true, subtree: true, characterData: true });

    // ---- images, from wherever they come, go into the box ----
    function give(files) {
        const input = find("#box input[type=file]");
        const images = [...files].filter(file => file.type.startsWith("image/"));
        if (!input || !images.length) return false;
        const bag = new DataTransfer();
        for (const image of input.multiple ? images : images.slice(-1)) bag.items.add(image);
        input.files = bag.files;
        input.dispatchEvent(new Event("change", {bubbles: true}));
        find("#box textarea")?.focus();
        return true;
    }
    const elsewhere = event => !event.target.closest?.("#box");
    const carriesFiles = event => [...(event.dataTransfer?.types || [])].includes("Files");
    document.addEventListener("dragover", event => {
        if (!carriesFiles(event)) return;
        event.preventDefault();
        document.body.classList.add("dropping");
    });
    for (const name of ["dragleave", "drop", "dragend"])
        document.addEventListener(name, event => {
            if (name !== "dragleave" || !event.relatedTarget) document.body.classList.remove("dropping");
        }, true);
    document.addEventListener("drop", event => {
        if (!carriesFiles(event) || !elsewhere(event)) return;
        event.preventDefault();  // else the browser would leave the page for the image
        give(event.dataTransfer.files);
    });
    document.addEventListener("paste", event => {
        if (elsewhere(event) && give(event.clipboardData.files)) event.preventDefault();
    });

    // ---- the sketch pad ----
    const pad = () => find("#pad dialog"), canvas = () => find("#pad canvas");
    let strokes = [], colour = null, width = 16;
    function paint() {
        const pen = canvas().getContext("2d");
        pen.fillStyle = "#ffffff";
        pen.fillRect(0, 0, canvas().width, canvas().height);
        pen.lineCap = pen.lineJoin = "round";
        for (const stroke of strokes) {
            pen.strokeStyle = stroke.colour;
            pen.lineWidth = stroke.width;
            pen.beginPath();
            stroke.points.forEach(([x, y], at) => at ? pen.lineTo(x, y) : pen.moveTo(x, y));
            if (stroke.points.length === 1) pen.lineTo(stroke.points[0][0] + 0.01, stroke.points[0][1]);
            pen.stroke();
        }
    }
    function place(event) {
        const frame = canvas().getBoundingClientRect(), scale = canvas().width / frame.width;
        return [(event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale];
    }
    function choosePen(button) {
        const group = button.parentElement;
        for (const other of group.querySelectorAll("button"))
            other.setAttribute("aria-pressed", String(other === button));
        if (button.dataset.colour) colour = button.dataset.colour;
        if (button.dataset.width) width = Number(button.dataset.width);
    }
    document.addEventListener("pointerdown", event => {
        if (event.target !== canvas() || event.button) return;
        event.preventDefault();
        event.target.setPointerCapture(event.pointerId);
        strokes.push({colour: colour || find("#pad [data-colour]").dataset.colour, width, points: [place(event)]});
        paint();
    });
    document.addEventListener("pointermove", event => {
        if (event.target !== canvas() || !event.target.hasPointerCapture(event.pointerId)) return;
        strokes.at(-1).points.push(place(event));
        paint();
    });
    const actions = {
        open() { pad().showModal(); paint(); },
        undo() { strokes.pop(); paint(); },
        empty() { strokes = []; paint(); },
        close() { pad().close(); },
        use() {
            if (!strokes.length) return;
            canvas().toBlob(blob => give([new File([blob], "drawing.png", {type: "image/png"})]));
            strokes = [];
            pad().close();
        },
        language() {
            chinese = !chinese;
            try { localStorage.setItem("language", chinese ? "zh" : "en"); } catch { /* not kept, then */ }
            speak();
        },
    };
    document.addEventListener("click", event => {
        const button = event.target.closest?.("[data-do]"), pen = event.target.closest?.("#pad [aria-pressed]");
        if (button) actions[button.dataset.do]();
        if (pen) choosePen(pen);
    });

    // ---- the copy button hands over what the Chatbot was given, escaped (conversation.shown): as typed again ----
    // Without https or loopback there is no navigator.clipboard: it then copies from a textarea off the screen.
    const marks = {amp: "&", lt: "<", gt: ">", quot: '"', "#x27": "'"}, board = navigator.clipboard;
    const typed = text => text.replace(/<span class="facts">[^]*?<\/button><\/span>/g, "")
        .replace(/<[^>]*>/g, "").replace(/&(amp|lt|gt|quot|#x27);/g, (all, name) => marks[name]);
    if (board) { const write = board.writeText.bind(board); board.writeText = text => write(typed(text)); }
    document.addEventListener("copy", event => { if (event.target.style?.left === "-999999px") {
        event.clipboardData.setData("text/plain", typed(event.target.value)); event.preventDefault(); } });
    document.documentElement.dataset.ready = "";  // for whoever drives the page
}
