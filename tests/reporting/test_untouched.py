from pave_lightning.reporting.untouched import untouched_lines


def test_one_line_for_each_reason_and_set_of_layers():
    entries = [(task, layer, "no example reached it") for layer in ("a", "b") for task in ("movie", "tweet")]
    entries += [("topic", "a", "no example reached it"), ("topic", "b", "all its inputs were zero")]
    assert untouched_lines(entries) == [
        "no example reached it: 2 layers of movie, tweet (a, b)",
        "no example reached it: 1 layer of topic (a)",
        "all its inputs were zero: 1 layer of topic (b)",
    ]
    assert untouched_lines([]) == []


def test_the_first_names_stand_for_many():
    entries = [("movie", f"layer.{place}", "r") for place in range(4)]
    assert untouched_lines(entries) == ["r: 4 layers of movie (layer.0, layer.1, layer.2 and 1 more)"]
