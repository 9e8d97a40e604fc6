"""The demo world's images: what is held out stays out, and a scene is drawn as its words say."""

import colorsys
import dataclasses
import itertools
import math

import numpy as np
import pytest
from PIL import Image

from dataset.demo_world import colours, paint, scenes
from dataset.demo_world.colours import COLOURS, MIN_CONTRAST
from dataset.demo_world.recipe import PRESETS, Preset
from dataset.demo_world.scenes import HELD_OUT_PAIRS, TEST_SPLITS, Paper, Scene, draw, make_splits, split_of
from dataset.demo_world.things import (
    CLEAR_BANDS,
    CLEAR_SIZES,
    POSITIONS,
    SHAPES,
    SIDE,
    SIZES,
    Thing,
    cover,
    make_form,
)


def triple(thing: Thing) -> tuple:
    return thing.colour, thing.shape, thing.position


def things_of(some: list[Scene]) -> list[Thing]:
    return [thing for scene in some for thing in scene.things]


def named(some: list[Scene]) -> list[Thing]:
    return [thing for thing in things_of(some) if thing.colour is not None]


@pytest.fixture(scope="module", params=PRESETS)
def preset(request) -> Preset:
    return PRESETS[request.param]


@pytest.fixture(scope="module")
def splits(preset) -> dict[str, list[Scene]]:
    return make_splits(preset, seed=0)


@pytest.fixture(scope="module")
def everything(splits) -> list[Scene]:
    return [scene for some in splits.values() for scene in some]


# ---- what is held out ----


def test_counts(preset, splits):
    assert list(splits) == ["train", *TEST_SPLITS]
    train = splits["train"]
    counts = [len(scene.things) for scene in train]
    assert len(train) == preset.train_images
    several = round(preset.several_share * len(train))
    assert [counts.count(n) for n in (1, 2, 3)] == [
        len(train) - several,
        several - several // 3,
        several // 3,
    ]
    unnamed = [scene for scene in train if any(thing.colour is None for thing in scene.things)]
    assert len(unnamed) == round(preset.unnamed_share * len(train)) and all(
        len(scene.things) == 1 for scene in unnamed
    )
    for split in TEST_SPLITS:
        tested = [len(scene.things) for scene in splits[split]]
        expected = (1, 0, 0) if split in scenes.SINGLE_SPLITS else (0, 1, 1 / 2)
        assert [tested.count(n) for n in (1, 2, 3)] == [share * preset.test_images for share in expected]
        assert named(splits[split]) == things_of(splits[split])


def test_a_world_knows_the_words_of_its_preset(preset, everything):
    for attribute in ("colour", "shape", "size"):
        found = {getattr(thing, attribute) for thing in named(everything)}
        assert found == set(getattr(preset, f"{attribute}s"))


def test_unseen_triples_are_never_drawn_but_each_of_their_pairs_is(splits):
    train = {triple(thing) for thing in named(splits["train"])}
    unseen = {triple(scene.things[0]) for scene in splits["unseen"]}
    assert train.isdisjoint(unseen)
    for first, second in itertools.combinations(range(3), 2):
        drawn = {(kind[first], kind[second]) for kind in train}
        assert {(kind[first], kind[second]) for kind in unseen} <= drawn


def test_held_out_pairs_are_never_drawn_and_share_no_colour_and_no_shape(preset, splits):
    pairs = {(thing.colour, thing.shape) for thing in things_of(splits["unseen_pairs"])}
    assert pairs == {(c, s) for c, s in HELD_OUT_PAIRS if c in preset.colours and s in preset.shapes}
    assert len(pairs) == len({c for c, _ in pairs}) == len({s for _, s in pairs}) >= 2
    for split in splits:
        drawn = {(thing.colour, thing.shape) for thing in things_of(splits[split])}
        assert split == "unseen_pairs" or pairs.isdisjoint(drawn)


def test_training_draws_every_other_pair(preset, splits):
    train = {triple(thing) for thing in named(splits["train"])}
    pairs = set(itertools.product(preset.colours, preset.shapes)) - set(HELD_OUT_PAIRS)
    assert {(c, s) for c, s, _ in train} == pairs
    assert {(c, p) for c, _, p in train} == set(itertools.product(preset.colours, POSITIONS))
    assert {(s, p) for _, s, p in train} == set(itertools.product(preset.shapes, POSITIONS))


def test_training_draws_every_known_triple_alone_in_every_size(preset, splits):
    drawn = {
        (*triple(scene.things[0]), scene.things[0].size)
        for scene in splits["train"]
        if len(scene.things) == 1
    }
    known = scenes.divide_triples(preset)["known"]
    assert {(*kind, size) for kind in known for size in preset.sizes} <= drawn


def test_a_quarter_of_the_triples_is_held_out(preset):
    triples = scenes.divide_triples(preset)
    known, unseen = len(triples["known"]), len(triples["unseen"])
    assert unseen / (known + unseen) == pytest.approx(1 / 4, abs=0.03)
    everything = list(itertools.product(preset.colours, preset.shapes, POSITIONS))
    assert sorted(itertools.chain.from_iterable(triples.values())) == sorted(everything)


def test_sets_kept_apart_are_shown_together_by_one_split_only(splits):
    """The sets are told by what is drawn, not by the rule: those of several_unseen are drawn nowhere else."""
    drawn: dict[str, list[set[frozenset]]] = {
        split: [
            {
                frozenset([(one.colour, one.shape), (two.colour, two.shape)])
                for one, two in itertools.combinations(scene.things, 2)
            }
            for scene in some
        ]
        for split, some in splits.items()
    }
    together = {split: set().union(*sets) for split, sets in drawn.items()}
    for sets in drawn["several_unseen"]:
        assert sets - together["train"] - together["several_known"]
        assert any(scenes.are_kept_apart(*pair) for pair in sets)
    for split in ("train", "several_known"):
        assert not any(scenes.are_kept_apart(*pair) for pair in together[split] if len(pair) == 2)


def test_a_fifth_of_all_pairs_of_things_is_kept_apart():
    things = [pair for pair in itertools.product(COLOURS, SHAPES) if pair not in HELD_OUT_PAIRS]
    apart = {thing: [scenes.are_kept_apart(thing, other) for other in things] for thing in things}
    assert np.mean(list(apart.values())) == pytest.approx(1 / 5, abs=0.02)
    assert all(any(row) and not all(row) for row in apart.values())
    for one, two in itertools.product(things, things):
        assert scenes.are_kept_apart(one, two) == scenes.are_kept_apart(two, one)
        assert not scenes.are_kept_apart(one, (None, two[1]))


def test_several_things_are_of_known_triples_at_different_places_and_look_different(everything):
    for scene in everything:
        if len(scene.things) > 1:
            assert {split_of(*triple(thing)) for thing in scene.things} == {"known"}
        assert len({thing.position for thing in scene.things}) == len(scene.things)
        assert len({(thing.colour, thing.shape) for thing in scene.things}) == len(scene.things)


def test_things_are_in_reading_order(everything):
    for scene in everything:
        places = [POSITIONS[thing.position][::-1] for thing in scene.things]  # (row, column)
        assert places == sorted(places)


def test_the_images_of_a_test_are_new(splits):
    """Only their triples are not. Nor does one test show what another does."""
    seen = set(splits["train"])
    for split in TEST_SPLITS:
        assert seen.isdisjoint(splits[split]) and len(set(splits[split])) == len(splits[split])
        seen |= set(splits[split])
    train = {triple(thing) for thing in things_of(splits["train"])}
    for split in ("known", "several_known", "several_unseen"):
        assert {triple(thing) for thing in things_of(splits[split])} <= train


def test_a_seed_is_a_world_but_what_is_held_out_is_the_same_for_all():
    """The encoder is trained once, for the worlds of all seeds."""
    small = dataclasses.replace(PRESETS["tiny"], train_images=400, several_share=0.3)
    world, again, other = (make_splits(small, seed) for seed in (3, 3, 4))
    assert world == again
    assert set(world["train"]).isdisjoint(other["train"])
    for split in scenes.SINGLE_SPLITS:
        kinds, others = ({triple(scene.things[0]) for scene in some[split]} for some in (world, other))
        assert len(kinds) > 10 and len(kinds & others) > 0.6 * len(kinds)
        trained = {triple(thing) for thing in named(other["train"])}
        assert kinds <= trained if split == "known" else kinds.isdisjoint(trained)


def test_the_tiny_world_holds_out_what_the_full_one_does():
    tiny, full = (scenes.divide_triples(PRESETS[name]) for name in ("tiny", "full"))
    assert all(set(tiny[split]) < set(full[split]) for split in scenes.SINGLE_SPLITS)


# ---- where things are, and in what colours ----


def test_things_lie_clearly_in_their_region_and_nothing_is_cut_off(everything):
    for thing in things_of(everything):
        for coordinate, band in zip(thing.centre, POSITIONS[thing.position], strict=True):
            low, high = CLEAR_BANDS[band]
            assert low <= coordinate <= high
            assert thing.radius < coordinate < SIDE - thing.radius
        low, high = CLEAR_SIZES[thing.size]
        assert low <= thing.radius <= high and SIZES[thing.size][0] <= low and high <= SIZES[thing.size][1]
        assert np.linalg.norm(thing.corners, axis=1).max() == pytest.approx(1)


def test_what_the_words_mean_lies_apart():
    """No thing is at the border of two words."""
    assert SIZES["small"][1] + 4 < SIZES["large"][0]
    for before, after in itertools.pairwise(CLEAR_BANDS):
        assert before[1] + 4 < after[0]


def test_things_are_anywhere_in_their_region(splits):
    """Not on a grid, as they once were: what an encoder can do with 9 places says nothing about the 10th."""
    middles = [thing.centre for thing in things_of(splits["train"]) if thing.position == "middle"]
    assert len(set(middles)) == len(middles)
    assert (np.ptp(middles, axis=0) > 20).all()  # of the 24 that there are


def test_things_do_not_overlap(everything):
    """Nor do the circles around them, as they are drawn."""
    for scene in everything:
        stretch = math.sqrt(scene.width * scene.height) / SIDE
        for one, two in itertools.combinations(scene.things, 2):
            across, down = np.subtract(one.centre, two.centre) / SIDE * (scene.width, scene.height)
            assert math.hypot(across, down) > (one.radius + two.radius) * stretch
    for scene in [scene for scene in everything if len(scene.things) > 1][:600]:
        covered = sum((covered_pixels(thing, scene) > 127).astype(int) for thing in scene.things)
        assert covered.max() == 1, (scene.width, scene.height)


def covered_pixels(thing: Thing, scene: Scene) -> np.ndarray:
    """(height, width), 0..255: with its own colour or its edge's."""
    masks = [mask for mask in cover(thing, scene.width, scene.height, scene.smooth) if mask]
    return np.max(masks, axis=0)


def test_everything_stands_out_from_its_paper(everything):
    for scene in everything:
        for thing in scene.things:
            assert math.dist(thing.rgb, scene.paper.rgb) > MIN_CONTRAST - 2  # both are rounded
            brightness = np.mean(thing.rgb) - np.mean(scene.paper.rgb)
            assert abs(brightness) > scenes.MIN_BRIGHTNESS_CONTRAST - 1


def test_named_colours_lie_in_their_box_and_unnamed_ones_in_none(everything):
    found: dict[str | None, list] = {}
    for thing in things_of(everything):
        names = {name for name in COLOURS if lies_in(name, thing.rgb)}
        assert names == {thing.colour} - {None}
        found.setdefault(thing.colour, []).append(thing.rgb)
    for rgbs in found.values():  # ranges, not points
        coloured = [rgb for rgb in rgbs if len(set(rgb)) > 1]  # there are only so many greys
        assert len(rgbs) > 60 and len(set(coloured)) > 0.6 * len(coloured)
    assert {len(set(rgb)) == 1 for rgb in found[None]} == {True, False}  # greys, and colours without a name


def test_no_pink_is_a_border_case():
    """Half of all wrong colours were salmons and mauves."""
    margin = scenes.MIN_NAME_DISTANCE["pink"]
    some = dataclasses.replace(PRESETS["full"], train_images=1200, test_images=1)
    pinks = [thing.rgb for thing in things_of(make_splits(some, 0)["train"]) if thing.colour == "pink"]
    assert len(pinks) > 100
    assert min(scenes.distance_to_others(np.array(rgb), "pink") for rgb in pinks) > margin - 2  # rounded
    assert max(scenes.distance_to_others(np.array(rgb), "pink") for rgb in pinks) > margin + 20


def test_distance_to_the_colours_of_other_names():
    def distance(rgb: tuple, colour: str) -> float:
        return scenes.distance_to_others(np.array(rgb), colour)

    assert distance((200, 0, 0), "pink") == pytest.approx(0, abs=1e-6)  # it is a red
    # The nearest to pure cyan of another name is a green of full value, at 158 degrees.
    assert distance((0, 255, 255), "cyan") == pytest.approx(math.dist((0, 255, 255), (0, 255, 161.5)), abs=1)
    rng = np.random.default_rng(0)
    boxed = {name: colours.named_rgbs(np.full(3000, n), rng) for n, name in enumerate(COLOURS)}
    for rgb in ((247, 108, 130), (255, 152, 220), (90, 200, 90)):  # nearly as near as any of them
        nearest = min(
            np.linalg.norm(some - rgb, axis=1).min() for name, some in boxed.items() if name != "pink"
        )
        assert abs(nearest - distance(rgb, "pink")) < 12


def lies_in(name: str, rgb: tuple) -> bool:
    """Within what rounding to whole numbers does to it."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))
    hues, saturations, values = COLOURS[name]
    off_centre = abs((360 * hue - sum(hues) / 2 + 180) % 360 - 180)
    return (
        off_centre < (hues[1] - hues[0]) / 2 + 2
        and saturations[0] - 0.01 < saturation < saturations[1] + 0.01
        and values[0] - 0.01 < value < values[1] + 0.01
    )


def test_no_colour_has_two_names():
    """Between two boxes lies a hue, or a paleness, that nobody need name."""
    for (hues, saturations, _), (others, other_saturations, _) in itertools.combinations(COLOURS.values(), 2):
        between = ((sum(hues) - sum(others)) / 2 + 180) % 360 - 180  # hues are a circle
        apart = abs(between) - (np.ptp(hues) + np.ptp(others)) / 2
        assert apart > 8 or saturations[0] > other_saturations[1] + 0.1


def test_the_pen_of_an_edge_brings_no_second_colour(everything):
    """Black, a grey, white, or darker than the thing and of its hue."""
    edged = [thing for thing in things_of(everything) if thing.style == "edged"]
    assert edged
    for thing in edged:
        assert is_pen_for(thing)


def is_pen_for(thing: Thing) -> bool:
    darker = np.array(thing.edge) / np.maximum(thing.rgb, 1)
    shade = max(thing.edge) / max(1, *thing.rgb)
    grey = len(set(thing.edge)) == 1
    return grey or 0.25 < shade < 0.75 and np.abs((darker - shade) * thing.rgb).max() < 2


# ---- drawing ----


def plain(thing: Thing, **more) -> Scene:
    """A thing on white, sharp and without noise."""
    return Scene((thing,), Paper((255, 255, 255)), **more)


def make_thing(shape: str, style: str = "filled", seed: int = 0, position: str = "middle") -> Thing:
    rng = np.random.default_rng(seed)
    while (form := make_form(shape, position, "large", rng)).style != style:
        pass
    return Thing("red", shape, "large", position, (200, 20, 30), edge=(0, 0, 0), **vars(form))


def sharp(scene: Scene) -> Scene:
    return dataclasses.replace(scene, paper=Paper(scene.paper.rgb), noise=0.0, blur=0.0)


def test_an_image_shows_its_things_where_and_as_the_scene_says(splits):
    for scene in splits["train"][:150]:
        image = draw(sharp(scene))
        assert image.size == (scene.width, scene.height) and image.mode == "RGB"
        pixels = np.asarray(image).astype(int)
        differs = np.abs(pixels - scene.paper.rgb).sum(-1) > 0
        rows, columns = np.mgrid[: scene.height, : scene.width]
        stretch = np.sqrt(scene.width * scene.height) / SIDE  # of a radius, in pixels
        for thing in scene.things:
            x, y = thing.centre[0] / SIDE * scene.width, thing.centre[1] / SIDE * scene.height
            radius = thing.radius * stretch
            # A line is drawn around the corners, and its mitres stick out.
            near = np.hypot(columns + 0.5 - x, rows + 0.5 - y) < radius + thing.line * stretch + 1.5
            shown = np.argwhere(differs & near)
            assert 1.1 * radius < np.ptp(shown, axis=0).max() < 2 * radius + 2 * thing.line * stretch + 2
            assert np.abs(shown.mean(0) + 0.5 - (y, x)).max() < 0.3 * radius + 1
            if thing.style != "hollow":
                assert image.getpixel((int(x), int(y))) == thing.rgb
            differs &= ~near
        assert not differs.any()  # nothing else is there


def test_nothing_is_cut_off_at_the_borders(everything):
    """Neither where an image is wider than high, nor the outer half of a thick line."""
    for scene in everything[:600]:
        for thing in scene.things:
            covered = covered_pixels(thing, scene) > 127
            cut_off = covered[[0, -1]].any() or covered[:, [0, -1]].any()
            assert not cut_off, (scene.width, scene.height, thing)


@pytest.mark.parametrize("shape", SHAPES)
def test_filled_edged_and_hollow(shape):
    for seed in range(5):
        thing = make_thing(shape, "edged", seed)
        scene = plain(thing, smooth=1)
        drawn = {tuple(pixel) for pixel in np.asarray(draw(scene)).reshape(-1, 3).tolist()}
        assert drawn == {(255, 255, 255), thing.rgb, thing.edge}
        for style, second in {"filled": None, "hollow": None, "edged": thing.edge}.items():
            image = draw(plain(dataclasses.replace(thing, style=style), smooth=1))
            centre = image.getpixel(tuple(map(int, thing.centre)))
            assert centre == ((255, 255, 255) if style == "hollow" else thing.rgb)
            colours = {colour for _, colour in image.getcolors()} - {(255, 255, 255), thing.rgb}
            assert colours == ({second} if second else set())


def test_all_styles_are_drawn_and_the_wider_part_of_things_is_filled(splits):
    styles = [thing.style for thing in things_of(splits["train"])]
    shares = {style: styles.count(style) / len(styles) for style in ("filled", "edged", "hollow")}
    assert shares == pytest.approx({"filled": 0.6, "edged": 0.2, "hollow": 0.2}, abs=0.06)


def test_all_shapes_differ_in_their_pixels():
    for seed in range(10):
        covered = {}
        for shape in SHAPES:
            thing = dataclasses.replace(make_thing(shape, seed=seed), centre=(64, 64), radius=20)
            covered[shape] = covered_pixels(thing, plain(thing)) > 127
        for one, two in itertools.combinations(SHAPES, 2):
            both, either = covered[one] & covered[two], covered[one] | covered[two]
            assert both.sum() < 0.87 * either.sum(), (one, two, seed)


def test_turned_squares_and_diamonds_stay_what_they_are():
    """A square turned by 45 degrees is a diamond: the corners of one keep to the diagonals, of the other to
    the axes."""
    for shape, seed in itertools.product(("square", "diamond"), range(200)):
        corners = np.array(make_thing(shape, seed=seed).corners)
        angles = np.degrees(np.arctan2(corners[:, 1], corners[:, 0])) % 90
        off_axis = np.minimum(angles, 90 - angles)
        assert off_axis.min() > 25 if shape == "square" else off_axis.max() < 20


def test_no_two_drawings_of_a_word_have_the_same_corners(everything):
    for shape in SHAPES:
        corners = [thing.corners for thing in things_of(everything) if thing.shape == shape]
        assert len(set(corners)) == len(corners)


def test_a_circle_is_round_in_images_of_all_sides():
    for (width, height), style in itertools.product(paint.FORMATS, ("filled", "hollow")):
        image = draw(plain(make_thing("circle", style), width=width, height=height))
        shown = np.argwhere(np.asarray(image)[..., 1] < 200)
        assert np.abs(np.diff(np.ptp(shown, axis=0))).max() <= 2


def test_a_scene_has_the_same_bytes_every_time_and_the_suffix_of_its_kind(splits, tmp_path):
    suffixes = [scene.suffix for scene in splits["train"]]
    assert suffixes.count("png") / len(suffixes) == pytest.approx(0.3, abs=0.05)
    for noisy in splits["train"][:40]:
        scene = dataclasses.replace(noisy, noise=0.0)  # which JPEG does not keep
        paths = [tmp_path / f"{name}.{scene.suffix}" for name in "ab"]
        for path in paths:
            scenes.save(scene, path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
        with Image.open(paths[0]) as image:
            assert image.format == {"jpg": "JPEG", "png": "PNG"}[scene.suffix]
            error = np.abs(np.asarray(image).astype(int) - np.asarray(draw(scene)))
        assert error.max() == 0 if scene.suffix == "png" else error.mean() < 5
        scenes.save(noisy, paths[0])
        scenes.save(noisy, paths[1])
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_light_noise_and_blur_are_seen_only_where_the_scene_says():
    thing = make_thing("square")
    scene = Scene((thing,), Paper((120, 130, 140)), seed=5)
    sharp_pixels = np.asarray(draw(scene)).astype(int)
    corner = (slice(0, 30), slice(0, 30))
    assert np.ptp(sharp_pixels[corner].reshape(-1, 3), axis=0).max() == 0
    noisy = np.asarray(draw(dataclasses.replace(scene, noise=8.0))) - sharp_pixels
    assert noisy.std() == pytest.approx(8, abs=0.5) and abs(noisy.mean()) < 0.3
    graded = np.asarray(draw(dataclasses.replace(scene, paper=Paper((120, 130, 140), (30.0, 0.0)))))
    light = (graded - sharp_pixels)[..., 2]
    assert light[:, 0].max() == -30 and light[:, -1].min() == 30 and (np.diff(light[0]) >= 0).all()
    blurred = np.asarray(draw(dataclasses.replace(scene, blur=0.8)))
    assert len(np.unique(blurred.reshape(-1, 3), axis=0)) > len(
        np.unique(sharp_pixels.reshape(-1, 3), axis=0)
    )


def test_images_come_in_all_formats_and_on_all_papers(splits):
    train = splits["train"]
    assert {(scene.width, scene.height) for scene in train} == set(paint.FORMATS)
    brightness = np.array([np.mean(scene.paper.rgb) for scene in train])
    assert (brightness == 255).mean() == pytest.approx(0.25, abs=0.05)
    assert (brightness < 75).mean() > 0.2
    graded = np.mean([scene.paper.slope != (0.0, 0.0) for scene in train])
    assert graded == pytest.approx(0.3, abs=0.05)
