"""`python -m hf_vs2.methods` prints the table of methods of docs/methods.md."""

from . import markdown_table


if __name__ == "__main__":
    print(markdown_table())
