"""`hf-vs2 push`."""

from __future__ import annotations

from argparse import Namespace
from operator import attrgetter
from pathlib import Path

from ..output import say
from ..parsing import Parser


USAGE = "PATH REPO [options]"
DESCRIPTION = """\
Puts a checkpoint on the Hub in one commit, with a model card: an SAE, a VS2 model, or a folder of SAEs. Pushing
the same again changes nothing; a card that somebody has edited keeps its text. Prints the URL of the commit or of
the pull request."""
EXAMPLES = """\
examples:
  hf-vs2 push outputs/sae-cifar100 user/sae-clip-vit-base-patch32-cifar100 --license apache-2.0
  hf-vs2 push outputs/sae-cifar100 user/sae-clip-vit-base-patch32-cifar100 --results results.json --create_pr"""


def add_flags(parser: Parser) -> None:
    parser.section("what and where")
    parser.flag("path", type=Path, metavar="PATH", help="Folder of the checkpoint, or of several, one a subfolder.")
    parser.flag("repo_id", metavar="REPO", help="owner/name on the Hub, or a name under your account.")
    parser.flag(
        "--private", action="store_true", help="Make the repository private; refused if it exists and is public."
    )
    parser.flag("--create_pr", action="store_true", help="Propose the commit as a pull request.")
    parser.flag("--revision", help="Branch to push to, made if there is none.")
    parser.flag("--tag", help="Git tag to give the commit.")
    parser.flag("--token", help="Token that may write there [that of `hf auth login`, or HF_TOKEN].")
    parser.flag("--commit_message", help="What the history says.")
    parser.section("model card")
    parser.flag("--results", type=Path, metavar="JSON", help="Result file to show [PATH/results.json, if it exists].")
    parser.flag(
        "--license", help="Your licence for the checkpoint, as the Hub names it: apache-2.0, mit, cc-by-4.0, ..."
    )


keeps = attrgetter("repo_id")


def run(args: Namespace) -> None:
    from ...files.sharing.hub import push_to_hub

    commit = push_to_hub(
        args.path,
        args.repo_id,
        private=args.private or None,
        create_pr=args.create_pr,
        revision=args.revision,
        tag=args.tag,
        token=args.token,
        commit_message=args.commit_message,
        results=args.results,
        license=args.license,
    )
    say(commit.pr_url or commit.commit_url)
