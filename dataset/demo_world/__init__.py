"""A world small enough to be learnt in minutes: MiniMind-V's whole road without a download.

The real recipe needs gigabytes of images, CLIP and MiniMind's language model before its first step. Here
everything comes in the same formats and from this folder: images of one to three coloured shapes, videos in
which one moves or changes, sentences about them in Chinese and English, a tokenizer, a small language model,
and a small CLIP that arrives trained, as the real one does. The numbered scripts train on it unchanged, and
questions about combinations that training never showed tell by numbers whether the model sees.

    python -m dataset.demo_world --out dataset/demo

    colours.py, things.py    what colours and shapes are called so, and the pixels they cover
    paint.py                 papers, light, pens, noise: what else an image is made of
    scenes.py                images of them, and what is kept for the test
    videos.py                things that move or change their colour
    wording.py, sentences.py, tokenizer.py     all that is said about a scene: questions, answers, words
    recipe.py                how large a world is and how long everything trains
    build.py                 puts it all into one folder
    report.py                what was learnt, after training
    cosines.py, patches.py, encoder.py, eye.py     how the CLIP in clip/ was trained, and is trained anew
"""
