"""What the demo's report makes of answers."""

from dataset.demo_world.report import (
    break_lines,
    choose_records,
    choose_wrong,
    count_yes,
    were_never_shown,
)


def record(kind: str, given: str, **more) -> dict:
    return {"split": "several_unseen", "kind": kind, "control": "real", "given": given} | more


def test_how_often_yes_is_said():
    """In both languages; "没有。" ends as "有。" does, and is a no."""
    yes = ["红色图形是星形。红色星形？有。", "The red one is a star. A red star? Yes."]
    no = ["没有红色图形。红色星形？没有。", "Nothing is red. A red star? No.", "红色星形？有。没有", ""]
    records = [record("presence", text) for text in yes + no] + [record("count", yes[0])]
    records += [record("presence", no[0], control="blank")]
    assert count_yes(records) == {"several_unseen": {"real": round(2 / 6, 4), "blank": 0.0}}


def test_long_answers_are_broken_and_keep_their_words():
    chinese = "图片左上角有一个大的粉色十字形，右侧有一个小的粉色圆形，左下角有一个大的黄色菱形。"
    english = "A large pink cross at the top left, a small pink circle on the right, a large yellow diamond."
    assert break_lines(chinese).replace("\n", "") == chinese
    assert break_lines(english).replace("\n", " ") == english
    assert max(map(len, break_lines(chinese, 10).split("\n"))) == 10 and break_lines("") == " "


def test_the_sheet_shows_what_was_never_shown_each_image_once():
    records = [
        record(kind, "x", image=[f"{kind}{n}.jpg"], question="什么？", answer="y", split=split)
        for kind in ("description", "count", "where")
        for n in range(4)
        for split in ("several_known", "several_unseen")
    ]
    chosen = choose_records([one for one in records if were_never_shown(one)], with_chinese=True)
    assert {one["split"] for one in chosen} == {"several_unseen"} and len(chosen) >= 3
    assert len({one["image"][0] for one in chosen}) == len(chosen)


def test_the_sheet_shows_wrong_answers_if_there_are_any():
    """One of a kind, no image twice, and none that stands above already."""
    records = [
        record(kind, "x", image=[f"{number}.jpg"], question="什么？", answer="y", right=number % 2 == 0)
        for kind in ("description", "count", "where", "shape", "colour", "presence")
        for number in range(6)
    ]
    above = [records[1]]
    wrong = choose_wrong(records, True, above)
    assert not any(one["right"] for one in wrong) and "1.jpg" not in [one["image"][0] for one in wrong]
    assert len({one["kind"] for one in wrong}) == len({one["image"][0] for one in wrong}) == len(wrong) == 2
    assert choose_wrong(records, False, above) == []  # no font for their words
    assert choose_wrong([one | {"right": True} for one in records], True, []) == []
