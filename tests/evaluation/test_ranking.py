"""Two-stage retrieval against a brute-force version, with several captions an image."""

import numpy as np
import pytest

from scl_jax.evaluation.ranking import clearly_best, contrastive_scores, rank, score_in_batches, top_candidates

ITEMS, WIDTH = 23, 8


def gallery(seed=0, captions=(1, 5)):
    """Texts whose features resemble their item's, one to five an item, in shuffled order."""
    rng = np.random.default_rng(seed)
    items = rng.normal(size=(ITEMS, WIDTH)).astype(np.float32)
    text_items = rng.permutation(np.repeat(np.arange(ITEMS), rng.integers(captions[0], captions[1] + 1, ITEMS)))
    texts = (items[text_items] + 1.5 * rng.normal(size=(len(text_items), WIDTH))).astype(np.float32)
    odds = 2.0 * (text_items[:, None] == np.arange(ITEMS)) + rng.normal(size=(len(texts), ITEMS))
    return texts, items, text_items, odds


def cosines(texts, items):
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    return texts @ (items / np.linalg.norm(items, axis=1, keepdims=True)).T


def brute_force_recall(first_stage, second_stage, relevant, rerank, k):
    """Sorts Python lists, query by query: the first `rerank` of the first stage by the second, then the rest."""
    hits = 0
    for query in range(len(first_stage)):
        order = sorted(range(first_stage.shape[1]), key=lambda answer: -first_stage[query, answer])
        head = sorted(order[:rerank], key=lambda answer: -second_stage[query, answer])
        hits += any(relevant[query, answer] for answer in (head + order[rerank:])[:k])
    return hits / len(first_stage)


@pytest.mark.parametrize("rerank", [4, 12, 1000])
@pytest.mark.parametrize("combine", ["sum", "matching"])
def test_metrics_equal_brute_force(rerank, combine):
    texts, items, text_items, odds = gallery()
    result = rank(
        texts, items, text_items, score_pairs=lambda t, i: odds[t, i], rerank=rerank, combine=combine, batch_size=32
    )
    similarity = cosines(texts, items)
    matching = -np.log1p(np.exp(-odds))
    second = matching + similarity / 0.07 if combine == "sum" else matching
    relevant = text_items[:, None] == np.arange(ITEMS)
    for k in (1, 5, 10):
        for name, turn in (("text_to_image", lambda x: x), ("image_to_text", np.transpose)):
            expected = brute_force_recall(turn(similarity), turn(second), turn(relevant), rerank, k)
            assert result.metrics[f"retrieval/{name}/recall@{k}"] == pytest.approx(expected)
            expected = brute_force_recall(turn(similarity), turn(similarity), turn(relevant), 0, k)
            assert result.metrics[f"retrieval/contrastive/{name}/recall@{k}"] == pytest.approx(expected)


def test_what_is_not_scored_again_stays_in_its_order_behind_every_candidate():
    """Also where similarities differ by less than the scores of the candidates."""
    texts = np.eye(5, WIDTH, dtype=np.float32)
    items = 1 + 0.01 * np.random.default_rng(0).random((5, WIDTH), np.float32)
    odds = np.random.default_rng(1).normal(size=(5, 5))
    options = {"score_pairs": lambda t, i: odds[t, i], "rerank": 2, "temperature": 1.0, "combine": "matching"}
    top = rank(texts, items, np.arange(5), **options).text_to_item
    for found, similarity, own in zip(top.ids, cosines(texts, items), odds, strict=True):
        order = np.argsort(-similarity)
        assert found.tolist() == [*order[:2][np.argsort(-own[order[:2]])], *order[2:]]


def test_ranks_are_told_by_their_median():
    texts = np.eye(5, dtype=np.float32)
    items = texts.copy()
    items[4] = [4, 3, 2, 1, 0]  # to the last text all items are alike
    metrics = rank(texts, items, np.arange(5)).metrics
    assert metrics["retrieval/text_to_image/median_rank"] == 1.0  # of 1, 1, 1, 1 and 3


def test_equal_captions_find_one_anothers_items_when_asked():
    """Items 0 and 1 share a caption; its features are nearest to item 1."""
    items = np.eye(3, dtype=np.float32)
    texts = np.array([[0.6, 0.8, 0], [0.5, 0.9, 0], [0, 0, 1]], np.float32)
    own = rank(texts, items, np.arange(3)).metrics
    assert own["retrieval/text_to_image/recall@1"] == pytest.approx(2 / 3)
    alike = rank(texts, items, np.arange(3), captions=["a star", "a star", "a cross"]).metrics
    assert alike["retrieval/text_to_image/recall@1"] == alike["retrieval/image_to_text/recall@1"] == 1.0


def test_all_captions_of_an_item_find_their_equals():
    """The second caption of item 0 is that of item 1, whose feature is the nearest to both items."""
    items = np.array([[1, 0.5, 0], [0, 1, 0]], np.float32)
    texts = np.array([[0, 0, 1], [-1, 0, 0], [0.5, 1, 0]], np.float32)
    captions = ["a ring", "a star", "a star"]
    alike = rank(texts, items, np.array([0, 0, 1]), captions=captions).metrics
    assert alike["retrieval/image_to_text/recall@1"] == 1.0


def test_a_matching_head_that_does_not_clearly_help_gets_no_weight():
    assert clearly_best({0.0: 0.84, 1.0: 0.85, 2.0: 0.83}, queries=700) == 0.0  # one standard error is 0.0135
    assert clearly_best({0.0: 0.80, 0.5: 0.84, 1.0: 0.85}, queries=700) == 0.5
    assert clearly_best({0.0: 0.999, 1.0: 1.0}, queries=700) == 1.0


def test_the_best_weight_of_the_matching_head_is_taken():
    """Odds that contradict the truth deserve no weight, odds that know it all of it."""
    texts, items, text_items, _ = gallery()
    truth = text_items[:, None] == np.arange(ITEMS)
    for odds, expected in ((10.0 * ~truth, 0.0), (200.0 * truth - 100.0, 1.0)):
        options = {"score_pairs": lambda t, i, odds=odds: odds[t, i], "rerank": ITEMS}
        both = rank(texts, items, text_items, weights=(0.0, 1.0), **options).metrics
        assert both["retrieval/matching_weight"] == expected
        assert both == rank(texts, items, text_items, weights=(expected,), **options).metrics
        alone = rank(texts, items, text_items, **options).metrics
        assert both["retrieval/mean_recall"] >= max(
            alone["retrieval/mean_recall"], both["retrieval/contrastive/mean_recall"]
        )


def test_the_best_answers_are_those_of_the_weight_that_is_taken():
    texts, items, text_items, _ = gallery()
    odds = 10.0 * (text_items[:, None] != np.arange(ITEMS))  # which contradict the truth
    both = rank(texts, items, text_items, score_pairs=lambda t, i: odds[t, i], rerank=ITEMS, weights=(0.0, 1.0))
    alone = rank(texts, items, text_items)
    np.testing.assert_array_equal(both.text_to_item.ids, alone.text_to_item.ids)
    np.testing.assert_array_equal(both.item_to_text.ids, alone.item_to_text.ids)


def test_the_standard_error_is_that_of_all_queries(monkeypatch):
    texts, items, text_items, odds = gallery()
    told = {}
    monkeypatch.setattr("scl_jax.evaluation.ranking.clearly_best", lambda _, **more: told.update(more) or 1.0)
    rank(texts, items, text_items, score_pairs=lambda t, i: odds[t, i], rerank=3)
    assert told == {"queries": len(texts) + ITEMS}


def test_weights_are_of_the_sum_alone():
    """The score of fine-tuning orders candidates by itself: no weight is chosen or told."""
    texts, items, text_items, odds = gallery()
    options = {"score_pairs": lambda t, i: odds[t, i], "rerank": 8, "combine": "matching"}
    several = rank(texts, items, text_items, weights=(0.0, 1.0), **options).metrics
    assert several == rank(texts, items, text_items, **options).metrics
    assert "retrieval/matching_weight" not in several


def test_mean_recall_is_the_mean_of_the_six_recalls():
    texts, items, text_items, odds = gallery()
    metrics = rank(texts, items, text_items, score_pairs=lambda t, i: odds[t, i], rerank=8).metrics
    for prefix in ("retrieval/", "retrieval/contrastive/"):
        six = [metrics[f"{prefix}{way}/recall@{k}"] for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
        assert metrics[f"{prefix}mean_recall"] == pytest.approx(np.mean(six))


def test_only_candidates_are_scored_each_once_in_batches_of_one_size():
    texts, items, text_items, odds = gallery()
    seen = []

    def score(text_ids, item_ids):
        assert len(text_ids) == len(item_ids) == 16
        seen.extend(zip(text_ids, item_ids, strict=True))
        return odds[text_ids, item_ids]

    metrics = rank(texts, items, text_items, score_pairs=score, rerank=3, batch_size=16).metrics
    similarity = cosines(texts, items)
    wanted = {(t, i) for t, row in enumerate(top_candidates(similarity, 3)) for i in row}
    wanted |= {(t, i) for i, row in enumerate(top_candidates(similarity.T, 3)) for t in row}
    assert wanted <= set(seen) and len(set(seen) - wanted) <= 1  # padding repeats the pair (0, 0)
    assert metrics["retrieval/pairs_scored"] == len(wanted)
    assert len(seen) < len(wanted) + 16


def test_without_a_matching_head_contrastive_similarity_decides():
    texts, items, text_items, _ = gallery()
    metrics = rank(texts, items, text_items, rerank=0, item="video").metrics
    assert metrics["retrieval/video/text_to_video/recall@1"] > 0.1
    for way in ("text_to_video", "video_to_text"):
        for k in (1, 5, 10):
            contrastive = metrics[f"retrieval/contrastive/video/{way}/recall@{k}"]
            assert metrics[f"retrieval/video/{way}/recall@{k}"] == contrastive
    assert metrics["retrieval/video/pairs_scored"] == 0


def test_a_model_that_sees_no_difference_gets_chance():
    count = 50
    same = np.ones((count, WIDTH), np.float32)
    metrics = rank(same, same, np.arange(count), score_pairs=lambda t, i: np.zeros(len(t)), rerank=10).metrics
    assert metrics["retrieval/contrastive/text_to_image/recall@1"] == pytest.approx(1 / count)
    assert metrics["retrieval/text_to_image/recall@1"] <= 1 / count + 1e-9
    assert metrics["retrieval/image_to_text/recall@5"] <= 5 / count + 1e-9


def test_top_answers_are_in_the_order_of_their_scores():
    texts, items, text_items, odds = gallery()
    result = rank(texts, items, text_items, score_pairs=lambda t, i: odds[t, i], rerank=6)
    assert result.text_to_item.ids.shape == (len(texts), 10) and result.item_to_text.ids.shape == (ITEMS, 10)
    assert (np.diff(result.text_to_item.scores, axis=1) <= 0).all()
    first = np.mean(result.text_to_item.ids[:, 0] == text_items)
    assert first == pytest.approx(result.metrics["retrieval/text_to_image/recall@1"])


def test_chunks_change_nothing():
    texts, items, _, _ = gallery()
    whole = contrastive_scores(texts, items)
    np.testing.assert_allclose(contrastive_scores(texts, items, chunk=7), whole, atol=1e-6)
    np.testing.assert_allclose(whole, cosines(texts, items), atol=1e-6)
    np.testing.assert_array_equal(top_candidates(whole, 5, chunk=7), top_candidates(whole, 5))


def test_no_pairs_need_no_call():
    assert score_in_batches(np.zeros(0, int), np.zeros(0, int), None, 4).shape == (0,)


@pytest.mark.parametrize(
    ("text_items", "message"), [([0, 0, 1], "no text, the first is item 2"), ([0, 1, 3], "holds 3"), ([-1, 1, 2], "-1")]
)
def test_texts_and_items_that_do_not_fit_are_refused(text_items, message):
    with pytest.raises(ValueError, match=message):
        rank(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), np.array(text_items))


@pytest.mark.parametrize("combine", ["sum", "matching"])
def test_all_pairs_are_as_many_candidates_as_there_are_answers(combine):
    texts, items, text_items, odds = gallery()
    told = []
    options = {"score_pairs": lambda t, i: odds[t, i], "combine": combine, "batch_size": 32}
    every = rank(texts, items, text_items, all_pairs=True, rerank=0, progress=lambda *now: told.append(now), **options)
    many = rank(texts, items, text_items, rerank=len(texts), **options)
    assert every.metrics == many.metrics
    assert every.metrics["retrieval/pairs_scored"] == odds.size
    np.testing.assert_array_equal(every.text_to_item.ids, many.text_to_item.ids)
    assert told[-1] == (odds.size, odds.size) and [done for done, _ in told] == sorted(done for done, _ in told)


def test_results_do_not_depend_on_the_batch_size():
    texts, items, text_items, odds = gallery()
    results = [
        rank(texts, items, text_items, score_pairs=lambda t, i: odds[t, i], rerank=6, all_pairs=every, batch_size=size)
        for every in (False, True)
        for size in (1, 7, 64, 4096)
    ]
    assert all(result.metrics == results[0].metrics for result in results[:4])
    assert all(result.metrics == results[4].metrics for result in results[4:])
