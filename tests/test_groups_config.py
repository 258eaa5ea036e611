"""How completions of a group are selected and drawn, and the configuration of making groups."""

import random

import pytest
from interrupted import config, make_prompts, make_teacher

from grkd_trl.generation import GroupsConfig, draw_seed, generate_groups
from grkd_trl.generation.select import drop_repeats, select_diverse


class TestSelection:
    def test_drop_repeats(self):
        assert drop_repeats(["a", "", "b", "a", " ", "c", "b"]) == [0, 2, 5]

    def test_max_min(self):
        """Against all distances, by the definition."""

        def distance(a, b):
            row = list(range(len(b) + 1))
            for i, x in enumerate(a, 1):
                last, row[0] = row[0], i
                for j, y in enumerate(b, 1):
                    last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
            return row[-1]

        draw = random.Random(0)
        for _ in range(30):
            texts = list(dict.fromkeys("".join(draw.choices("ab", k=draw.randint(1, 9))) for _ in range(7)))
            pairs = [(i, j) for i in range(len(texts)) for j in range(i + 1, len(texts))]
            chosen = list(max(pairs, key=lambda pair: distance(texts[pair[0]], texts[pair[1]])))
            while len(chosen) < 4:
                left = [i for i in range(len(texts)) if i not in chosen]
                chosen.append(max(left, key=lambda i: min(distance(texts[i], texts[j]) for j in chosen)))
            assert select_diverse(texts, 4) == sorted(chosen)

    def test_few_are_all_kept(self):
        assert select_diverse(["a", "b"], 3) == [0, 1]


def test_every_shard_writer_and_seed_draws_otherwise():
    seeds = {
        draw_seed(seed, shard, writer) for seed in (0, 1) for shard in range(9) for writer in ("student", "teacher")
    }
    assert len(seeds) == 36 and all(0 <= seed < 2**32 for seed in seeds)


class TestConfig:
    @pytest.mark.parametrize(
        "field, value",
        [
            ("completion_source", "me"),
            ("num_completions", 1),
            ("num_drawn", 2),
            ("num_teacher_completions", 3),
            ("temperature", -1.0),
            ("top_p", 0.0),
            ("max_completion_length", 0),
            ("prompts_per_shard", 0),
        ],
    )
    def test_ranges(self, tmp_path, field, value):
        with pytest.raises(ValueError, match=f"`{field}`"):
            config(tmp_path, **{field: value})

    def test_former_name_of_a_shard(self, tmp_path):
        with pytest.warns(FutureWarning, match="`prompts_per_unit` is now `prompts_per_shard`"):
            old = GroupsConfig(str(tmp_path), prompts_per_unit=5)
        assert old == GroupsConfig(str(tmp_path), prompts_per_shard=5)

    def test_missing_writer(self, tmp_path):
        with pytest.raises(ValueError, match='`completion_source="mixed"` needs `teacher`'):
            generate_groups(make_prompts(), config(tmp_path), student=make_teacher(0))

    def test_defaults_are_those_of_the_paper(self):
        args = GroupsConfig("out")
        assert (args.num_drawn, args.num_completions, args.temperature, args.top_p) == (5, 4, 1.0, 0.95)
