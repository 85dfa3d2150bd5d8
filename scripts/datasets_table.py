"""Prints the data sets that come with the package as the Markdown table of docs/datasets.md."""

from hf_vs2.data.registry import available, dataset_info


def markdown_table() -> str:
    """One line a data set."""
    lines = [
        "| name | data set, Hub id | splits | columns | classes | metric | pitfalls |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in available():
        info = dataset_info(name)
        pitfalls = " ".join(info.pitfalls)
        if not info.verified:
            pitfalls += f" Not fully verified: {info.verification}."
        cells = (
            f"`{name}`",
            f"{info.title}, `{info.source_id}`",
            f"`{info.train_split}`, `{info.test_split}`",
            f"`{info.image_column}`, `{info.label_column}`",
            str(len(info.classes or ())),
            info.metric.replace("_", " "),
            pitfalls,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
