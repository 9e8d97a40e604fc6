"""A world small enough to be learnt in minutes: MiniMind-V's whole road without a download.

The real recipe needs gigabytes of images, CLIP and MiniMind's language model before its first step. Here
all of it is made on the spot and in the same formats: images of one coloured shape each, sentences about
them in Chinese and English, a tokenizer, a CLIP and a small language model. The numbered scripts train on it
unchanged, and questions about combinations that training never showed tell by numbers whether the model sees.

    python -m dataset.demo_world --out dataset/demo

    scenes.py      what exists, how it is drawn, what is kept for the test, and the recipe of every stage
    videos.py       objects that move or change their colour
    sentences.py   all that is said about a scene: captions, questions, answers, and the tokenizer
    encoder.py     the CLIP that looks at the images
    build.py       puts it all into one folder
    report.py      what was learnt, after training
"""
