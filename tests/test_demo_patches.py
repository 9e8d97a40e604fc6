"""Scenes composed of what the cosines say of forms are what they say of the drawn images."""

import numpy as np
import pytest
import torch

from dataset.demo_world import patches, scenes
from dataset.demo_world.cosines import AXES, cosines, respond
from dataset.demo_world.patches import Bank, Crowd, compose, squash_masks
from dataset.demo_world.scenes import Paper, Scene
from dataset.demo_world.things import POSITIONS, SHAPES, SIZES, Thing, cover, make_form
from model.vision_utils import ImageProcessor, get_img_process

FREQUENCIES = 6


def some_scene(seed: int, count: int, width: int, height: int, slope: tuple[float, float]) -> Scene:
    """Things of all styles in mid colours, so that nothing is clipped."""
    rng = np.random.default_rng(seed)
    things = []
    while len(things) < count:
        words = [str(rng.choice(list(names))) for names in (SHAPES, POSITIONS, SIZES)]
        form = make_form(*words, rng)
        if scenes.has_room(form, things, (width, height)):
            rgb, edge = (tuple(rng.integers(60, 200, 3).tolist()) for _ in range(2))
            shape, position, size = words
            things.append(Thing("red", shape, size, position, rgb, edge=edge, **vars(form)))
    return Scene(tuple(things), Paper((120, 140, 110), slope), width, height)


@pytest.mark.parametrize(
    ("count", "width", "height", "slope"),
    [(1, 224, 224, (0, 0)), (3, 224, 224, (30, -20)), (2, 160, 120, (0, 0)), (3, 128, 128, (-25, 10))],
)
def test_composed_scenes_are_the_drawn_ones(count, width, height, slope):
    for seed in range(8):
        scene = some_scene(seed, count, width, height, slope)
        masks = [squash_masks(*cover(thing, width, height, scene.smooth)) for thing in scene.things]
        inside, line = (
            respond(torch.from_numpy(np.stack(part))[:, None], cosines(FREQUENCIES))
            for part in zip(*masks, strict=True)
        )
        bank = Bank(inside, line, np.zeros((count, 3)), 1)
        zeros = np.zeros((1, count), int)
        crowd = Crowd(np.array([count]), zeros, zeros, zeros, zeros, np.arange(count)[None])
        composed = compose(
            crowd,
            bank,
            np.array([scene.paper.rgb]),
            np.array([[thing.rgb for thing in scene.things]]),
            np.array([[thing.edge for thing in scene.things]]),
            np.array([slope]),
        )
        pixels = get_img_process(scenes.draw(scene), ImageProcessor())[None]
        drawn = torch.stack(
            [
                respond((pixels * axis[:, None, None]).sum(1, keepdim=True), cosines(FREQUENCIES))
                for axis in AXES
            ],
            dim=2,
        )
        error = (composed - drawn).square().mean().sqrt() / drawn.square().mean().sqrt()
        assert error < 0.01, (seed, error)


def test_a_crowd_keeps_to_what_is_held_out():
    rng = np.random.default_rng(0)
    bank = patches.make_bank(1, 2, rng)
    crowd = patches.draw_crowd(np.full(300, 5), bank, rng, unnamed_share=0.2)
    colours, shapes, positions = [*scenes.COLOURS, None], list(SHAPES), list(POSITIONS)
    for scene, count in enumerate(crowd.count):
        things = [
            (
                colours[crowd.colour[scene, k]],
                shapes[crowd.shape[scene, k]],
                positions[crowd.position[scene, k]],
            )
            for k in range(count)
        ]
        assert all(scenes.split_of(*thing) == "known" for thing in things)
        assert not scenes.holds_a_set_kept_apart(things)
        assert len({position for _, _, position in things}) == count
    assert crowd.count.mean() > 4


def test_the_first_thing_of_a_test_crowd_is_of_its_split():
    rng = np.random.default_rng(0)
    bank = patches.make_bank(1, 2, rng)
    for split in scenes.SINGLE_SPLITS:
        crowd = patches.draw_crowd(np.full(50, 2), bank, rng, split=split)
        names = zip(crowd.colour[:, 0], crowd.shape[:, 0], crowd.position[:, 0], strict=True)
        lists = [*scenes.COLOURS], SHAPES, [*POSITIONS]
        assert all(
            scenes.split_of(*(names[n] for names, n in zip(lists, numbers, strict=True))) == split
            for numbers in names
        )


def test_every_thing_stands_out_from_its_paper():
    rng = np.random.default_rng(0)
    bank = patches.make_bank(1, 2, rng)
    crowd = patches.draw_crowd(np.full(200, 3), bank, rng, unnamed_share=0.3)
    papers, colours = patches.dress(crowd, rng)
    contrast = np.linalg.norm(colours - papers[:, None], axis=-1)
    assert contrast[crowd.things()].min() > scenes.MIN_CONTRAST
