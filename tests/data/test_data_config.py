import pytest

from kdjax.data.config import DataConfig
from kdjax.errors import UserError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 1}, "data.sequence_length is 1; it must be at least 2"),
        ({"eval_fraction": 1.5}, "data.eval_fraction is 1.5; it must be from 0.0 to 0.999"),
        ({"eval_tokens": 0}, "data.eval_tokens is 0"),
        ({"packing": "best"}, "data.packing is 'best'; it must be one of concat, first_fit"),
        ({"sources": ()}, "data.sources is empty"),
        ({"weights": (1.0, 2.0)}, "data.weights has 2 numbers for 1 sources"),
        ({"weights": (0.0,)}, "each must be above 0"),
        ({"weights": (float("nan"),)}, "each must be above 0"),
    ],
)
def test_bad_settings_say_what_may_be(settings, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**settings)
