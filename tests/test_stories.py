import random
from itertools import islice

import pytest

from trainer.storybook.world.render import HERO_ON_LEFT, render, render_with_figures
from trainer.storybook.world.state import HEROES, PLACES, PROPS, State, held_out
from trainer.storybook.world.stories import stories


def test_stories_are_the_same_for_the_same_seed():
    assert list(islice(stories(5), 20)) == list(islice(stories(5), 20))
    assert list(islice(stories(5), 3)) != list(islice(stories(6), 3))


def test_one_combination_in_ten_is_held_out_and_never_trained_on():
    every = [State(hero, place, "day", prop) for hero in HEROES for place in PLACES for prop in PROPS]
    share = sum(map(held_out, every)) / len(every)
    assert 0.07 < share < 0.13
    assert not any(held_out(scene.state) for story in islice(stories(1), 200) for scene in story)
    assert all(any(held_out(scene.state) for scene in story) for story in islice(stories(1, "test"), 20))


def test_later_sentences_do_not_name_the_kind_and_carry_what_was_found():
    for story in islice(stories(2), 200):
        first, *later = story
        assert 4 <= len(story) <= 6 and first.state.hero in first.text
        assert all(first.state.hero not in scene.text.lower().split() for scene in later)
        assert len({scene.state.hero for scene in story}) == 1
        for before, after in zip(story, later, strict=False):
            changed = [
                name
                for name in ("place", "time", "prop", "companion")
                if getattr(before.state, name) != getattr(after.state, name)
            ]
            assert len(changed) <= 1
            assert after.names_prop == ("prop" in changed)


def test_the_caption_names_everything_in_the_picture():
    state = State("fox", "beach", "night", "balloon", "bee")
    assert state.caption() == "a fox with a red balloon on the beach at night and a bee"


@pytest.mark.parametrize(
    ("changes"), [{"hero": "bear"}, {"place": "city"}, {"time": "night"}, {"prop": None}]
)
def test_a_change_of_state_changes_the_picture(changes):
    state = State("fox", "beach", "day", "balloon")
    assert (
        render(state, random.Random(1)).tobytes() != render(state.but(**changes), random.Random(1)).tobytes()
    )
    assert render(state, random.Random(1)).tobytes() == render(state, random.Random(1)).tobytes()


def test_figures_are_marked_where_hero_prop_and_companion_stand():
    state = State("panda", "city", "day", prop="ball", companion="snail")
    picture, cells = render_with_figures(state, random.Random(4))
    assert picture.tobytes() == render(state, random.Random(4)).tobytes()
    assert cells.shape == (16, 16)
    assert not cells[:8].any()  # sky and scenery
    assert not cells[15].any()  # everything stands one cell above the lower edge
    assert (
        cells[8:15].sum() > 50
    )  # 7 x 7 cells of hero, 5 x 5 of prop, 3 x 3 of companion, less empty corners
    plain, none = render_with_figures(State("panda", "city", "day"), random.Random(4))
    assert none.sum() < cells.sum()


@pytest.mark.parametrize("place", PLACES)
def test_in_every_place_the_hero_keeps_to_a_side_and_leaves_the_other_to_the_prop(place):
    draws = [random.Random(seed) for seed in range(12)]
    heroes = [render_with_figures(State("panda", place, "day"), draw)[1] for draw in draws]
    columns = {column for cells in heroes for column in cells.any(0).nonzero()[0]}
    assert columns <= set(range(8) if place in HERO_ON_LEFT else range(8, 16))
    assert len({cells.tobytes() for cells in heroes}) == 2  # one cell further in, or not


def test_half_of_the_places_have_the_hero_on_the_left():
    assert set(HERO_ON_LEFT) < set(PLACES) and len(HERO_ON_LEFT) == len(PLACES) / 2
