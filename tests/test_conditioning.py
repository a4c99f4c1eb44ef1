import subprocess
import sys

import pytest

from minigpt5_core.conditioning import SPACES, Space, check_space
from minigpt5_core.errors import BadInputError


def test_every_space_is_listed_under_its_own_name_with_as_many_tokens_as_its_text_encoders_give():
    assert list(SPACES) == ["sd15", "sd21", "sdxl", "sd3", "flux", "storybook"]
    assert all(name == space.name for name, space in SPACES.items())
    assert [space.tokens for space in SPACES.values()] == [77, 77, 77, 154, 256, 77]


def test_a_space_fits_itself():
    for space in SPACES.values():
        check_space(space, space)


def test_another_number_of_tokens_still_fits():
    check_space(Space("sd15", 32, 768), SPACES["sd15"])


def test_another_width_is_an_error_naming_both_sides():
    with pytest.raises(BadInputError, match=r"sd15 \(77 x 768\).*sd21 \(77 x 1024\)"):
        check_space(SPACES["sd15"], SPACES["sd21"])


def test_another_pooled_width_is_an_error_naming_both_sides():
    with pytest.raises(BadInputError, match=r"sd3 .*pooled vector of 2048\).*flux .*pooled vector of 768\)"):
        check_space(SPACES["sd3"], SPACES["flux"])


def test_a_pooled_vector_where_none_is_taken_is_an_error():
    with pytest.raises(BadInputError, match=r"pooled vector of 1280\), but .*wide \(77 x 2048\)"):
        check_space(SPACES["sdxl"], Space("wide", 77, 2048))


def test_reading_the_table_does_not_import_torch():
    code = "import sys; from minigpt5_core import conditioning; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
