"""Statements and pairs are told apart by their names: one of another form, or given twice, is a problem."""

import json

from scl_jax.data.builders import nlvr2, snli_ve
from scl_jax.data.builders.caption_files import Problem


def problems(read_tree, split, file, rows):
    """(line, reason) of the rows that cannot be used, and how many items are left."""
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = list(read_tree(file.parent.parent).entries[split])
    found = [(entry.place.line, entry.reason) for entry in entries if isinstance(entry, Problem)]
    return found, len(entries) - len(found)


def test_identifiers_of_statements(tmp_path):
    names = ("dev-7-0-0", "weird", "dev-7-0-1", "dev-7-0-0", "dev--0-0", "dev-mine-1-0")
    rows = [{"identifier": name, "sentence": "one is red", "label": "True"} for name in names]
    file = tmp_path / "data/dev.json"
    found, items = problems(nlvr2.read_tree, "dev", file, rows)
    assert items == 2
    assert found == [
        (2, "identifier 'weird' is not split-set-pair-sentence, such as dev-850-0-0"),
        (4, f"identifier 'dev-7-0-0' is that of {file}, line 1 too"),
        (5, "identifier 'dev--0-0' is not split-set-pair-sentence, such as dev-850-0-0"),
    ]


def test_names_of_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(snli_ve, "required", lambda source, name: source / "pairs" / name)
    rows = [{"Flickr30K_ID": "1", "pairID": name, "sentence2": "red", "gold_label": "neutral"} for name in "aba"]
    file = tmp_path / "pairs/snli_ve_test.jsonl"
    assert problems(snli_ve.read_tree, "test", file, rows) == ([(3, f"pairID 'a' is that of {file}, line 1 too")], 1)
