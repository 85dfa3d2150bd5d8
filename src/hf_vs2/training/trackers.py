"""Trackers of a training's log, by accelerate's names: there and ready before anything long begins."""

from __future__ import annotations

import netrc
import os
from pathlib import Path

from ..config.schema import one_of


# Where the log goes to somebody's account: the variables that hold its key, the host in ~/.netrc, what makes it stay
# here, how to log in.
_ACCOUNTS = {
    "wandb": ("WANDB_API_KEY", "api.wandb.ai", "WANDB_MODE", "`wandb login`, or set WANDB_MODE=offline"),
    "comet_ml": ("COMET_API_KEY", "", "COMET_MODE", "`comet login`, or set COMET_MODE=offline"),
    "swanlab": ("SWANLAB_API_KEY", "swanlab.cn", "SWANLAB_MODE", "`swanlab login`, or set SWANLAB_MODE=local"),
}
_ELSEWHERE = {"comet_ml": (".comet.config",), "swanlab": (".swanlab/.netrc",), "wandb": ()}


def check_tracker(name: str) -> None:
    """
    Refuse a tracker that is not known, not installed, or not logged in.

    Raises:
        `ValueError`: on a name that accelerate does not know, and on an account without a key. `ImportError`: without
            its package.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name == "none":
        return
    one_of([*sorted(LOGGER_TYPE_TO_CLASS), "all", "none"]).read(name, "report_to")
    there = [str(getattr(one, "value", one)) for one in get_available_trackers()]
    if name != "all" and name not in there:
        raise ImportError(f"report_to={name}: that tracker is not installed. Install it, or use report_to=none.")
    for tracker in there if name == "all" else [name]:
        if tracker in _ACCOUNTS and not _has_key(tracker):
            raise ValueError(f"report_to={name}: {tracker} is not logged in. Run {_ACCOUNTS[tracker][-1]}.")


def _has_key(tracker: str) -> bool:
    variable, host, mode, _ = _ACCOUNTS[tracker]
    if os.environ.get(variable) or os.environ.get(mode, "online") not in ("online", "cloud", "get_or_create"):
        return True
    if any((Path.home() / place).exists() for place in _ELSEWHERE[tracker]):
        return True
    if tracker == "wandb":
        here = Path("wandb/settings")  # what `wandb offline` writes
        if here.is_file() and any(word in here.read_text(errors="replace") for word in ("offline", "disabled")):
            return True
        host = os.environ.get("WANDB_BASE_URL", host).rpartition("/")[-1]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
