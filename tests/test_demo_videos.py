"""The demo world's videos: one thing that moves or changes its colour, and nothing held out in any second."""

import itertools
import math

import numpy as np
import pytest

from dataset.demo_world import scenes, videos
from dataset.demo_world.colours import MIN_CONTRAST, is_near_a_name
from dataset.demo_world.recipe import PRESETS, Preset
from dataset.demo_world.scenes import draw
from dataset.demo_world.things import CLEAR_BANDS, POSITIONS, SIDE, Thing, cover
from model.data.video import read_frames


def things_of(video: videos.Video) -> list[Thing]:
    """What is to be seen in each second."""
    return [thing for scene in video for thing in scene.things]


def triples_of(video: videos.Video) -> list[tuple]:
    return [(thing.colour, thing.shape, thing.position) for thing in things_of(video)]


@pytest.fixture(scope="module", params=PRESETS)
def preset(request) -> Preset:
    return PRESETS[request.param]


@pytest.fixture(scope="module")
def all_videos(preset) -> dict[str, list[videos.Video]]:
    return videos.make_videos(preset, seed=0)


@pytest.fixture(scope="module")
def everything(all_videos) -> list[videos.Video]:
    return [video for some in all_videos.values() for video in some]


def test_as_many_videos_of_each_change_as_wanted(preset, all_videos):
    assert list(all_videos) == ["train", "unseen"]
    for split, count in {"train": preset.train_videos, "unseen": preset.test_videos}.items():
        changes = [videos.change_of(video) for video in all_videos[split]]
        assert [changes.count(change) for change in videos.CHANGES] == [count // 2] * 2
        assert changes != sorted(changes) and changes != sorted(changes, reverse=True)  # in mixed order


def test_no_training_video_shows_what_is_held_out_and_every_test_video_begins_or_ends_with_it(
    preset, all_videos
):
    triples = scenes.divide_triples(preset)
    assert {triple for video in all_videos["train"] for triple in triples_of(video)} <= set(triples["known"])
    for video in all_videos["unseen"]:
        first, *_, last = triples_of(video)
        assert {first, last} & set(triples["unseen"])
        assert not set(triples_of(video)) & set(triples["unseen_pairs"])


def test_one_thing_changes_once_in_one_way(everything):
    for video in everything:
        assert len(video) == videos.SECONDS == len(things_of(video))
        things = things_of(video)
        assert (
            len({(thing.shape, thing.size, thing.radius, thing.corners, thing.style) for thing in things})
            == 1
        )
        assert len({(scene.paper, scene.blur, scene.smooth) for scene in video}) == 1
        places, colours = (
            [value for value, _ in itertools.groupby(values)]
            for values in ([thing.position for thing in things], [thing.colour for thing in things])
        )
        moves = videos.change_of(video) == videos.MOVEMENT
        assert len(set(places)) == len(places) == (3 if moves and is_halfway(places) else 2 if moves else 1)
        assert len(colours) == (1 if moves else 2)
        assert len({thing.centre for thing in things}) == len(places)
        assert len({thing.rgb for thing in things}) == len(colours)


def is_halfway(places: list[str]) -> bool:
    """Whether the second place is the middle between the first and the last, and another than these."""
    points = np.array([POSITIONS[place] for place in (places[0], places[1], places[-1])])
    return len(places) == 3 and np.array_equal(2 * points[1], points[0] + points[2])


def test_whoever_crosses_the_image_is_seen_in_the_middle(everything):
    """From one end of a row, a column or a diagonal to the other."""
    for video in everything:
        places = [thing.position for thing in things_of(video)]
        start, end = np.array(POSITIONS[places[0]]), np.array(POSITIONS[places[-1]])
        if videos.change_of(video) == videos.MOVEMENT:
            crosses = not ((end - start) % 2).any()
            assert len(set(places)) == (3 if crosses else 2)


def test_things_lie_clearly_in_their_region_and_stand_out_in_every_second(everything):
    for video in everything:
        for scene, thing in zip(video, things_of(video), strict=True):
            assert (scene.width, scene.height, scene.noise) == (SIDE, SIDE, 0)
            for coordinate, band in zip(thing.centre, POSITIONS[thing.position], strict=True):
                low, high = CLEAR_BANDS[band]
                assert low <= coordinate <= high
                assert thing.radius < coordinate < SIDE - thing.radius
            assert math.dist(thing.rgb, scene.paper.rgb) > MIN_CONTRAST - 2
            assert is_near_a_name(np.array([thing.rgb]))[0]


def test_nothing_is_cut_off_at_the_borders(everything):
    for video in everything:
        for thing in things_of(video):
            covered = np.max([mask for mask in cover(thing, SIDE, SIDE, 1) if mask], axis=0) > 127
            assert not covered[[0, -1]].any() and not covered[:, [0, -1]].any(), thing


def test_a_new_colour_keeps_no_edge_of_the_old_one(everything):
    """Edges are grey, or a darker tone of the thing's own colour: any other would be a second colour."""
    edged = [thing for video in everything for thing in things_of(video) if thing.style == "edged"]
    assert edged
    for thing in edged:
        if len(set(thing.edge)) > 1:
            shade = max(thing.edge) / max(thing.rgb)
            assert np.abs(np.array(thing.edge) - shade * np.array(thing.rgb)).max() < 2, thing


def test_every_change_is_shown_in_training(preset, all_videos):
    """In the full world each of the 72 ways from place to place, and each of the 56 from colour to colour."""
    if preset.train_videos < 1000:
        pytest.skip("too few videos")
    ends = [(things[0], things[-1]) for things in map(things_of, all_videos["train"])]
    assert (
        len({(first.position, last.position) for first, last in ends if first.position != last.position})
        == 72
    )
    assert len({(first.colour, last.colour) for first, last in ends if first.colour != last.colour}) == 56


def test_changes_happen_at_all_times(all_videos):
    """Else the last frames alone would do."""
    when = [tuple(now != then for now, then in itertools.pairwise(video)) for video in all_videos["train"]]
    assert (
        min(when.count(only) for only in ((True, False, False), (False, True, False), (False, False, True)))
        > 10
    )


def test_videos_of_a_seed_are_the_same_and_so_are_their_files(tmp_path):
    one, again, other = (videos.make_videos(PRESETS["tiny"], seed) for seed in (3, 3, 4))
    assert one == again and one != other
    for name in "ab":
        videos.save_video(one["train"][0], tmp_path / f"{name}.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_frame_per_second_shows_the_thing_at_rest_in_its_colour(tmp_path):
    """Between two places it would be nowhere; blurred by the codec, it would not be what it is."""
    for number, video in enumerate(videos.make_videos(PRESETS["full"], seed=0)["train"][:24]):
        path = tmp_path / f"{number}.mp4"
        videos.save_video(video, path)
        assert path.stat().st_size < 12_000
        frames = read_frames(path, max_frames=videos.SECONDS)
        assert len(frames) == videos.SECONDS
        for frame, scene in zip(frames, video, strict=True):
            drawn, shown = (np.asarray(image).astype(int) for image in (draw(scene), frame))
            assert np.abs(drawn - shown).mean() < 4
            (thing,) = scene.things
            own, line = cover(thing, SIDE, SIDE, 1)
            own = np.asarray(own) > 0
            if line and thing.style == "edged":
                own &= np.asarray(line) == 0
            # What is thin loses of its colour, which is coded at half of the image's resolution.
            far = 10 if thing.style != "hollow" and thing.size == "large" else 100
            assert np.abs(np.median(shown[own], axis=0) - np.median(drawn[own], axis=0)).max() < far


def test_between_two_seconds_it_glides(everything):
    frames_per_second = videos.FRAMES_PER_SECOND
    for video in everything[:10]:
        frames = [np.asarray(frame).astype(int) for frame in videos.draw_frames(video)]
        assert len(frames) == videos.SECONDS * frames_per_second
        for second, scene in enumerate(video):
            resting = frames[second * frames_per_second :][: videos.RESTING_FRAMES]
            assert all(np.array_equal(frame, draw(scene)) for frame in resting)
            leading = frames[second * frames_per_second + videos.RESTING_FRAMES :][
                : frames_per_second - videos.RESTING_FRAMES
            ]
            changes = second + 1 < videos.SECONDS and video[second + 1] != scene
            for frame in leading:
                assert np.array_equal(frame, resting[0]) == (not changes)
