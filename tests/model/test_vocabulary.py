"""The one check of token ids."""

from __future__ import annotations

import pytest

from halve.errors import DataError
from halve.model.vocabulary import check_ids


class Spelling:
    def token(self, token_id: int) -> str:
        return f"<{token_id}>"


def test_ids_of_the_vocabulary_pass() -> None:
    check_ids(97, [[0, 96], (), [3]], Spelling())


@pytest.mark.parametrize("outside", [97, 10**6, -1])
def test_an_id_outside_is_named_with_the_size_and_the_remedy(outside: int) -> None:
    with pytest.raises(DataError, match=f"token id {outside} is outside of the model's vocabulary of 97"):
        check_ids(97, [[0, 96], [5, outside]])
    with pytest.raises(DataError, match=rf"token '<{outside}>' \(id {outside}\).* 97 .*resize_token_embeddings"):
        check_ids(97, [[0, 96], [5, outside]], Spelling())
