"""Test recommendation by matching: rows from ratings, the rivals, ranks over all items, and the command."""

import csv
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import InputError
from recipes.matching import histories, item_ids, recommend
from recipes.matching.histories import FILES, genres_of, text_of, time_of
from recipes.matching.recommend import (
    Case,
    Log,
    neighbours,
    popularity,
    ranks,
    scores_of,
    user_interval,
    with_popularity,
)
from tests.conftest import read_jsonl

ITEMS = [
    {"movieId": str(i), "title": f"Film {i}, The ({1990 + i})" if i % 2 else f"Film {i}", "genres": "Drama|War"}
    for i in range(24)
]


def write_csv(path: Path, rows: list[dict]) -> str:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def some_ratings() -> list[dict]:
    """Return ratings of 12 users, in the order of users; items 20 to 23 come late."""
    draw, rows = random.Random(0), []
    for user in range(12):
        for n in range(14):
            time = 100 * n + user
            item = draw.randrange(20) if n < 12 else 20 + (user + n) % 4
            rows.append({"userId": user, "movieId": item, "rating": draw.choice([3, 4, 5.0]), "timestamp": time})
    return rows


@pytest.fixture
def arguments(tmp_path):
    """Return a function that writes files of ratings and items, and returns the arguments of `histories`."""

    def make(ratings: list[dict], items: list[dict] = ITEMS, *more: str) -> list[str]:
        files = {"ratings": ratings, "items": items}
        named = [
            w for name, rows in files.items() for w in (f"--{name}_file", write_csv(tmp_path / f"{name}.csv", rows))
        ]
        return [*named, "--output", str(tmp_path / "films"), "--overwrite", *more]

    return make


def test_texts_times_and_genres():
    assert text_of("Matrix, The (1999)", ["Action", "Sci-Fi"]) == "The Matrix (1999): Action, Sci-Fi"
    assert text_of("Up, Up and Away", []) == "Up, Up and Away"
    assert genres_of("Action|(no genres listed)") == ["Action"]
    assert genres_of('["War", "Drama"]') == ["War", "Drama"]
    assert genres_of(None) == genres_of("") == []
    assert genres_of(3) is None
    assert time_of("1970-01-01T00:01:00+00:00") == time_of("60") == time_of(60) == 60
    assert time_of("yesterday") is None


def test_rows_are_split_by_time_and_know_the_past_only(arguments, tmp_path):
    ratings = some_ratings()
    counts = histories.main(arguments(ratings, ITEMS, "--history", "3", "--test_share", "0.2"))
    folder = tmp_path / "films"
    found = {name: read_jsonl(folder / file) for name, file in FILES.items()}
    assert [counts[name] for name in histories.SPLITS] == [len(found[name]) for name in histories.SPLITS]
    assert counts["test_cold"] > 0
    by_time = sorted(ratings, key=lambda row: row["timestamp"])
    assert [(r["user"], r["item"]) for r in found["ratings"]] == [
        (str(r["userId"]), str(r["movieId"])) for r in by_time
    ]
    texts = {row["id"]: row["text"] for row in found["corpus"]}
    liked: dict[str, list[str]] = {}
    expected = {name: [] for name in histories.SPLITS}
    for place, row in enumerate(by_time):
        user, item = str(row["userId"]), str(row["movieId"])
        before = liked.setdefault(user, [])
        if row["rating"] >= 4 and item not in before:
            if before:
                query = "; ".join(texts[i] for i in before[::-1][:3])
                split = found["ratings"][place]["split"]
                expected[split].append({"query": query, "user": user, "item": item, "place": place})
            before.append(item)
    assert {name: found[name] for name in histories.SPLITS} == expected
    assert {row["user"]: row["query"] for row in found["users"]} == {
        user: "; ".join(texts[i] for i in items[::-1][:3]) for user, items in liked.items()
    }
    places = [[row["place"] for row in found[name]] for name in histories.SPLITS]
    assert max(places[0]) < min(places[1]) <= max(places[1]) < min(places[2])
    with pytest.raises(InputError, match=r"train.jsonl: exists already; choose another name, or add --overwrite"):
        histories.main([word for word in arguments(ratings) if word != "--overwrite"])


def test_items_of_one_text_are_one_item_and_rows_without_ratings_are_liked(arguments, tmp_path, capsys):
    same = [*ITEMS, ITEMS[3] | {"movieId": "99"}]
    rows = [{k: v for k, v in row.items() if k != "rating"} for row in some_ratings()]
    rows = [row | {"movieId": 99} if row["movieId"] == 3 else row for row in rows]
    histories.main(arguments(rows, same, "--rating_column_name", "none"))
    assert "1 items repeat title and genres of another and count as it" in capsys.readouterr().out
    ratings = read_jsonl(tmp_path / "films" / "ratings.jsonl")
    assert {row["item"] for row in ratings} <= {row["movieId"] for row in ITEMS}
    assert sum(row["liked"] for row in ratings) == len({(row["user"], row["item"]) for row in ratings})


def test_wrong_ratings_and_items_are_reported(arguments):
    good = some_ratings()
    bad = [*good[:3], good[3] | {"movieId": 77}, good[4] | {"rating": "high"}, good[5] | {"timestamp": "soon"},
           good[6] | {"userId": ""}, *good[7:]]  # fmt: skip
    with pytest.raises(InputError) as error:
        histories.main(arguments(bad))
    told = str(error.value).splitlines()
    assert [line.split(":")[1] for line in told] == ["5", "6", "7", "8"]
    assert "movieId is '77', which no row of" in told[0]
    for items, message in (
        ([*ITEMS, ITEMS[0]], r"movieId '0' is already that of .*items.csv:2; give each item one row"),
        ([ITEMS[0] | {"title": " "}, *ITEMS[1:]], r"items.csv:2: title is ' '; needed: a non-blank text"),
        ([{"id": 1, "title": "x"}], r"no column movieId; columns here: id, title; .*--item_column_name"),
    ):
        with pytest.raises(InputError, match=message):
            histories.main(arguments(good, items))
    for more, message in (
        (("--min_rating", "6"), r"0 ratings of at least --min_rating 6"),
        (("--test_share", "0.95"), r"--validation_share and --test_share: must be above 0, with a sum below 1"),
        (("--history", "0"), r"--history 0: must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            histories.main(arguments(good, ITEMS, *more))


def test_ranks_leave_out_what_the_user_rated_and_count_ties_against_the_item():
    scores = np.array([[5.0, 4, 3, 3, 1], [0, 0, 0, 0, 0], [-np.inf, 1, 2, -np.inf, 0]])
    cases = [Case("a", "", 2, [0], [0]), Case("b", "", 1, [], []), Case("b", "", 3, [2], [2])]
    found = ranks(lambda some: scores[: len(some)], cases)
    assert found.tolist() == [3, 5, 4]
    assert scores_of(np.array([1, 3, 10, 11])) == pytest.approx(
        np.array([[1, 1], [1, 1 / 2], [1, 1 / np.log2(11)], [0, 0]])
    )
    low, high = user_interval(np.array([1.0, 1, 1, 0, 0, 0]), ["a", "a", "a", "b", "b", "b"])
    assert (low, high) == (0, 1)  # two users: the rows of a user are no six observations


def test_popularity_and_neighbours_count_likes_of_the_training_time(arguments, tmp_path):
    histories.main(arguments(some_ratings()))
    log = Log(str(tmp_path / "films"))
    rows = [row for row in read_jsonl(tmp_path / "films" / "ratings.jsonl") if row["liked"] and row["split"] == "train"]
    users = {name: {row["user"] for row in rows if row["item"] == name} for name in log.ids}
    assert sorted(log.ids[i] for i in log.known) == sorted(name for name in log.ids if users[name])
    case = Case("x", "", 0, [], [log.known[1]])
    assert popularity(log)([case])[0].tolist() == [len(users[name]) for name in log.ids]
    last = users[log.ids[log.known[1]]]
    cosines = [len(users[n] & last) / max(1, len(users[n]) * len(last)) ** 0.5 for n in log.ids]
    assert neighbours(log)([case])[0] == pytest.approx(cosines, abs=1e-5)
    both = with_popularity(lambda cases: np.full((len(cases), 24), 0.5), log, 0.1, 2)
    assert both([case])[0] == pytest.approx([5 + 2 * np.log(1 + len(users[name])) for name in log.ids])
    for case in log.cases("test"):
        assert case.liked
        assert case.item not in case.liked
        assert set(case.liked) <= set(case.rated)


def test_the_model_of_item_ids_learns_an_order(monkeypatch):
    for name, value in (("BATCH", 3), ("PASSES", 60), ("PATIENCE", 60)):
        monkeypatch.setattr(item_ids, name, value)
    rows = [[1 + (start + n) % 9 for n in range(12)] for start in range(9)]

    def hits(model: item_ids.ItemModel) -> float:
        return float((item_ids.scores(model, [row[:-1] for row in rows]).argmax(1) == [row[-1] for row in rows]).mean())

    model = item_ids.train(rows, 9, 24, 1, hits)
    assert hits(model) == 1
    assert item_ids.scores(model, [[], [1] * 80]).shape == (2, 10)
    cut = item_ids.windows([list(range(1, 121)), [5]])
    assert [(w[0], w[-1]) for w in cut] == [(1, 51), (51, 101), (101, 120)]
    model.eval()
    whole, changed = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 9]])
    assert torch.allclose(model(whole)[:, :3], model(changed)[:, :3], atol=1e-2)  # no look ahead


def test_the_command_compares_and_recommends_new_items(arguments, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(item_ids, "PASSES", 2)
    histories.main(arguments(some_ratings(), ITEMS, "--test_share", "0.2"))
    folder, output = tmp_path / "films", tmp_path / "best.jsonl"
    words = ["--histories", str(folder), "--model", tiny, "--frozen", tiny, "--output", str(output), "--top_k", "5"]
    results = recommend.main([*words, "--precision", "fp32"])
    told = capsys.readouterr().out
    assert "test: " in told
    assert "popularity" in told
    assert results["this model_all_ndcg@10"] == results["before training_all_ndcg@10"]
    assert results["popularity_cold_hit@10"] == 0
    ratings = read_jsonl(folder / "ratings.jsonl")
    for row in read_jsonl(output):
        rated = {r["item"] for r in ratings if r["user"] == row["user"]}
        assert len(row["found"]) == min(5, 24 - len(rated))
        assert not rated & {item["id"] for item in row["found"]}
    log = Log(str(folder))
    assert len(log.cases("test", 5)) == 5
    assert log.cases("test", 5) == [case for case in log.cases("test") if case in log.cases("test", 5)]
    with pytest.raises(InputError, match="--temperature and --popularity: must be above 0, and at least 0"):
        recommend.main([*words, "--popularity", "-1"])
    with pytest.raises(InputError, match=r"best.jsonl: exists already"):
        recommend.main(words)
    with pytest.raises(
        InputError, match=r"--histories .*: has no train.jsonl; write it with recipes.matching.histories"
    ):
        recommend.main(["--histories", str(tmp_path), "--model", tiny])
