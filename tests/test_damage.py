"""A part of the campaign of ``damage.py``: whatever is spoiled, a number is right or refused, and nobody's file is lost."""

from damage import KINDS, campaign


def test_damage_gives_no_wrong_number_and_loses_nobodys_file(tmp_path):
    counts, bad = campaign(tmp_path, cases=40, seed=3)
    assert not bad
    assert {kind for kind, _ in counts} >= set(KINDS[:5])
    assert sum(n for (_, told), n in counts.items() if told == "refused") > 20
