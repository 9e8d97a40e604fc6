#!/usr/bin/env bash
# From a fresh machine with Python >= 3.11 to a vision-language model that answers about images it has never seen:
#     bash quickstart.sh             set up, make the demo world, train all stages, score, show answers
#     bash quickstart.sh --setup     only the virtual environment and its packages
#     bash quickstart.sh --real [FOLDER]   MiniMind-V v1's own model describes the images of a folder, or v1's photos
#     bash quickstart.sh --from-scratch    train the demo's CLIP as well, instead of taking the one that comes with it
# A second call goes on where the first one stopped. SEED=1 WORLD=dataset/demo1 OUT=out/demo1 bash quickstart.sh makes
# another world beside it; PRESET=tiny makes a smaller one that learns colours and shapes in a minute.
set -euo pipefail
CALLED_FROM=$PWD
cd "$(dirname "$0")"

WORLD=${WORLD:-dataset/demo}
OUT=${OUT:-out/demo}
SEED=${SEED:-0}
PRESET=${PRESET:-full}
PYTHON=.venv/bin/python
# PyTorch's threads wait for each other by spinning; where another program wants the same cores, that costs them tenfold.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}

fail() {
    printf '\nquickstart.sh stopped: %s\n  cure: %s\n' "$1" "$2" >&2
    exit 1
}

# run CURE COMMAND...: run a command, or stop and say which one failed and what to do about it
run() {
    local cure=$1
    shift
    printf '\n$ %s\n' "$*"
    "$@" || fail "this command failed (exit status $?): $*" "$cure"
}

# stage NAME CURE COMMAND...: like run, but only once per world, and timed
stage() {
    local name=$1 mark="$OUT/.$1.seconds" started=$SECONDS
    shift
    if [ -f "$mark" ]; then
        printf '\n%s: done before (%s s)\n' "$name" "$(cat "$mark")"
        return
    fi
    run "$@"
    echo $((SECONDS - started)) >"$mark"
}

set_up() {
    if [ ! -x "$PYTHON" ] || ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        local python
        for python in python3 python3.14 python3.13 python3.12 python3.11 ""; do
            [ -n "$python" ] || fail "no Python >= 3.11 found" "install one (python3.11 or newer) and run this again"
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        done
        run "install Python's venv module (Debian: apt-get install python3-venv)" "$python" -m venv .venv
    fi
    if ! cmp -s requirements.txt .venv/requirements.installed; then
        run "check the network connection and the free disk space, then run this again" \
            "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/requirements.installed
    fi
}

# describe_photos [FOLDER]: the shortest way to real photos described: fetch what v1 published, and ask it
describe_photos() {
    local folder=dataset/eval_images names=(clip tokenizer vlm)
    if [ -n "$1" ]; then
        folder=$(cd "$CALLED_FROM" && cd "$1" 2>/dev/null && pwd) || fail "there is no folder $1" "name one that holds images"
    else
        names+=(eval_images)
    fi
    run "see the lines above, then run this again: it goes on" "$PYTHON" -m model.download "${names[@]}"
    run "see the line above" "$PYTHON" 3-eval_chat.py --load_from out/512_vlm_sft.pth --image_dir "$folder"
    printf '\nWhat to run next\n'
    printf '  in the browser       .venv/bin/python web_server.py --load_from out/512_vlm_sft.pth\n'
    printf '  train it yourself    README.md, "Train on the real data"\n'
}

case "$*" in
    "" | --setup | --from-scratch) ;;
    --real | "--real ${2:-}")
        echo "CLIP, MiniMind's tokenizer and v1's model: 715 MB to download, once; about a minute at 100 Mbit/s"
        ;;
    *) fail "unknown argument: $*" "bash quickstart.sh, with --setup, --real or --from-scratch or nothing behind it" ;;
esac
set_up
case "${1:-}" in
    --setup) exit 0 ;;
    --real)
        describe_photos "${2:-}"
        exit 0
        ;;
esac
mkdir -p "$OUT"
again="look at the message above; run this again to go on, or remove $WORLD and $OUT to start anew"

clip=()
if [ "${1:-}" = --from-scratch ]; then
    stage clip "$again" "$PYTHON" -m dataset.demo_world.eye --out "$OUT/clip"
    clip=(--clip "$OUT/clip")
fi
stage world "$again" "$PYTHON" -m dataset.demo_world --out "$WORLD" --weights_dir "$OUT" \
    --preset "$PRESET" --seed "$SEED" "${clip[@]}"
stage pretrain "$again" "$PYTHON" 1-pretrain_vlm.py "@$WORLD/pretrain.args" --resume
stage sft "$again" "$PYTHON" 2-sft_vlm.py "@$WORLD/sft.args" --resume
stage multi "$again" "$PYTHON" 2-sft_vlm.py "@$WORLD/sft_multi.args" --resume
stage evaluation "$again" "$PYTHON" 3-eval_chat.py "@$WORLD/eval.args" --control real blank shuffled \
    --questions "$WORLD"/questions_{known,unseen,unseen_pairs,several_known,several_unseen}.jsonl --report "$OUT/scores.json"
stage evaluation_multi "$again" "$PYTHON" 3-eval_chat.py "@$WORLD/eval.args" --stage vlm_sft_multi \
    --control real blank shuffled swapped shuffled_frames \
    --questions "$WORLD"/questions_{multi,videos}_unseen.jsonl --report "$OUT/scores_multi.json"
run "$again" "$PYTHON" -m dataset.demo_world.report --world "$WORLD" --out "$OUT"
